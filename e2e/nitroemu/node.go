package nitroemu

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"cloister.dev/cloister/internal/vsockemu"
)

// The kernel's interface (include/uapi/linux/nitro_enclaves.h).
const (
	device = "/dev/nitro_enclaves"
	magic  = 0xAE

	createVM            = 0x8008AE20 // _IOR(0xAE, 0x20, __u64)
	addVCPU             = 0xC004AE21 // _IOWR(0xAE, 0x21, __u32)
	getImageLoadInfo    = 0xC010AE22 // _IOWR(0xAE, 0x22, struct ne_image_load_info)
	setUserMemoryRegion = 0x4018AE23 // _IOW(0xAE, 0x23, struct ne_user_memory_region)
	startEnclave        = 0xC010AE24 // _IOWR(0xAE, 0x24, struct ne_enclave_start_info)
)

var names = map[uint32]string{
	createVM: "NE_CREATE_VM", addVCPU: "NE_ADD_VCPU", getImageLoadInfo: "NE_GET_IMAGE_LOAD_INFO",
	setUserMemoryRegion: "NE_SET_USER_MEMORY_REGION", startEnclave: "NE_START_ENCLAVE",
}

// The driver's own errors (ibid.).
const (
	ErrVCPUAlreadyUsed       unix.Errno = 256
	ErrVCPUNotInCPUPool      unix.Errno = 257
	ErrVCPUInvalidCPUCore    unix.Errno = 258
	ErrInvalidMemRegionSize  unix.Errno = 259
	ErrInvalidMemRegionAddr  unix.Errno = 260
	ErrUnalignedMemRegion    unix.Errno = 261
	ErrMemRegionAlreadyUsed  unix.Errno = 262
	ErrMemNotHugePage        unix.Errno = 263
	ErrMemDifferentNUMANode  unix.Errno = 264
	ErrMemMaxRegions         unix.Errno = 265
	ErrNoMemRegionsAdded     unix.Errno = 266
	ErrNoVCPUsAdded          unix.Errno = 267
	ErrEnclaveMemMinSize     unix.Errno = 268
	ErrFullCoresNotUsed      unix.Errno = 269
	ErrNotInInitState        unix.Errno = 270
	ErrInvalidVCPU           unix.Errno = 271
	ErrNoCPUsAvailableInPool unix.Errno = 272
	ErrInvalidPageSize       unix.Errno = 273
	ErrInvalidFlagValue      unix.Errno = 274
	ErrInvalidEnclaveCID     unix.Errno = 275
)

const (
	pageSize         = 2 << 20  // NE_MIN_MEM_REGION_SIZE (ne_misc_dev.h)
	minEnclaveMemory = 64 << 20 // NE_MIN_ENCLAVE_MEM_SIZE
	loadOffset       = 8 << 20  // NE_EIF_LOAD_OFFSET
	parentCID        = 3        // NE_PARENT_VM_CID
	firstCID         = 16       // as hypervisors have been seen to begin
)

// Options of a Node.
type Options struct {
	// Dir is an empty folder with a short path.
	Dir string
	// CPUs is the number of the machine's vCPUs, Threads that of each core: vCPU n is of core n%(CPUs/Threads).
	CPUs, Threads int
	// Pool is the enclave pool, full cores.
	Pool []uint32
	// NUMANode is that of the pool. What no mbind says otherwise of is on node 0.
	NUMANode int
	// MaxRegions is how many pieces of contiguous memory an enclave may have; 0 is any number.
	MaxRegions int
	// Fail, when set, is asked before each ioctl, by its name, and before each "open"; 0 lets it go on.
	Fail func(call string) unix.Errno
	// Boot is the life of an enclave: this ends when Boot returns, and must end with ctx. Nil: it does nothing.
	Boot func(ctx context.Context, e Enclave)
}

// Enclave is what a Node has been told of one.
type Enclave struct {
	Slot   uint64
	Calls  []string // its ioctls in their order, with the error of those that failed, and "close"
	Memory uint64   // bytes
	CPUs   []uint32
	EIF    []byte // out of the memory, as it was when it was given away

	// Once it has been started.
	CID    uint32
	Debug  bool
	Ports  []uint32 // of the node, bound when it was started
	Folder string   // of its hybrid sockets
}

// enclave is struct ne_enclave.
type enclave struct {
	Enclave

	process int // the mm
	path    string
	hup     int // writing end of the pipe that the process has the reading end of; -1 when closed
	state   int
	cores   [][]uint32 // threads that are the enclave's, by core
	regions []region
	pieces  int
	eifSize uint64

	end        context.CancelFunc
	booted     sync.WaitGroup
	disconnect func()
}

const (
	stateInit = iota
	stateRunning
	stateStopped
)

type region struct{ addr, size uint64 }

// bound is memory of a process that mbind has put on a NUMA node.
type bound struct {
	process int
	region
	node int
}

// Node is a machine with the driver. Its ports are those of Ports.
type Node struct {
	Ports vsockemu.Node

	options Options
	inotify *os.File

	mu       sync.Mutex
	free     [][]uint32 // threads of the pool that are nobody's, by core
	enclaves []*enclave // all that were ever made
	watches  map[int32]*enclave
	bound    []bound
	cid      uint32
}

// New makes a node. Close it when no process uses it any more.
func New(o Options) (*Node, error) {
	n := &Node{
		Ports: vsockemu.Node(o.Dir), options: o, cid: firstCID,
		free: make([][]uint32, o.CPUs/o.Threads), watches: map[int32]*enclave{},
	}
	list := make([]string, len(o.Pool))
	for i, cpu := range o.Pool {
		list[i] = fmt.Sprint(cpu)
		n.free[n.core(cpu)] = append(n.free[n.core(cpu)], cpu)
		if err := n.system(fmt.Sprintf("devices/system/cpu/cpu%d/node%d/x", cpu, o.NUMANode), ""); err != nil {
			return nil, err
		}
	}
	for node := range o.NUMANode + 1 {
		if err := n.system(fmt.Sprintf("devices/system/node/node%d/x", node), ""); err != nil {
			return nil, err
		}
	}
	if err := n.system("module/nitro_enclaves/parameters/ne_cpus", strings.Join(list, ",")+"\n"); err != nil {
		return nil, err
	}
	if err := os.WriteFile(n.device(), nil, 0o600); err != nil {
		return nil, err
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch for closed descriptors: %w", err)
	}
	n.inotify = os.NewFile(uintptr(fd), "inotify")
	go n.watch()
	return n, nil
}

// Close frees what the node has; its enclaves must have gone.
func (n *Node) Close() error { return n.inotify.Close() }

func (n *Node) core(cpu uint32) int { return int(cpu) % len(n.free) }

func (n *Node) device() string { return filepath.Join(n.options.Dir, "nitro_enclaves") }

// system makes a file of the /sys that processes see.
func (n *Node) system(name, content string) error {
	path := filepath.Join(n.options.Dir, "sys", name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(content), 0o644)
}

// Do runs f on a thread of its own that has the node's device.
func (n *Node) Do(f func()) error {
	return Trap([]int{unix.SYS_OPENAT, unix.SYS_IOCTL, unix.SYS_MBIND}, n.answer, f)
}

// Start starts a process that has the node's device.
func (n *Node) Start(cmd *exec.Cmd) error {
	var err error
	return errors.Join(n.Do(func() { err = cmd.Start() }), err)
}

// Enclaves returns all that were ever made.
func (n *Node) Enclaves() []Enclave {
	n.mu.Lock()
	defer n.mu.Unlock()
	list := make([]Enclave, len(n.enclaves))
	for i, e := range n.enclaves {
		list[i] = e.Enclave
		list[i].Calls = slices.Clone(e.Calls)
	}
	return list
}

// FreeCPUs returns how many vCPUs of the pool are nobody's.
func (n *Node) FreeCPUs() (free int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, threads := range n.free {
		free += len(threads)
	}
	return free
}

func (n *Node) fail(call string) unix.Errno {
	if n.options.Fail == nil {
		return 0
	}
	return n.options.Fail(call)
}

// answer answers a system call.
func (n *Node) answer(c *Call) Answer {
	switch int(c.Nr) {
	case unix.SYS_OPENAT:
		return n.open(c)
	case unix.SYS_MBIND:
		return n.mbind(c)
	}
	link, err := os.Readlink(c.proc(fmt.Sprintf("fd/%d", int32(c.Args[0]))))
	if err != nil {
		return Answer{Errno: unix.EBADF}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	request := uint32(c.Args[1])
	name, ok := names[request]
	if !ok {
		return Answer{Errno: unix.ENOTTY}
	}
	if link == n.device() {
		if request != createVM {
			return Answer{Errno: unix.ENOTTY}
		}
		if errno := n.fail(name); errno != 0 {
			return Answer{Errno: errno}
		}
		return n.create(c)
	}
	for _, e := range n.enclaves {
		if e.path != link {
			continue
		}
		errno := n.fail(name)
		if errno == 0 {
			errno = n.request(e, request, c)
		}
		if errno != 0 {
			name += fmt.Sprintf(" error %d", int(errno))
		}
		e.Calls = append(e.Calls, name)
		return Answer{Errno: errno}
	}
	return Answer{Errno: unix.ENOTTY}
}

// open opens the device and the files of /sys that tell of it.
func (n *Node) open(c *Call) Answer {
	path, flags := c.path(c.Args[1]), int(int32(c.Args[2]))
	switch {
	case path == device:
		if errno := n.fail("open"); errno != 0 {
			return Answer{Errno: errno}
		}
		path = n.device()
	case strings.HasPrefix(path, "/sys/module/nitro_enclaves/"), strings.HasPrefix(path, "/sys/devices/system/cpu/cpu"),
		path == "/sys/devices/system/node", strings.HasPrefix(path, "/sys/devices/system/node/"):
		path = n.options.Dir + path
	default:
		return Answer{Continue: true}
	}
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return Answer{Errno: err.(unix.Errno)}
	}
	return Answer{File: os.NewFile(uintptr(fd), path)}
}

// mbind takes note of memory that is bound to one NUMA node, which this machine may not have.
func (n *Node) mbind(c *Call) Answer {
	const mpolBind = 2 // include/uapi/linux/mempolicy.h
	process, err := c.process()
	if err != nil || c.Args[2] != mpolBind || c.Args[4] < 64 {
		return Answer{Continue: true}
	}
	b, err := c.Read(c.Args[3], int(c.Args[4])/8)
	if err != nil {
		return Answer{Errno: unix.EFAULT}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for node := range 8 * len(b) {
		if b[node/8]&(1<<(node%8)) != 0 {
			if node > n.options.NUMANode {
				return Answer{Errno: unix.EINVAL}
			}
			n.bound = append(n.bound, bound{process, region{c.Args[0], c.Args[1]}, node})
		}
	}
	return Answer{}
}

// numaNode is where a page of a process is.
func (n *Node) numaNode(process int, addr uint64) int {
	for _, b := range slices.Backward(n.bound) {
		if b.process == process && b.addr <= addr && addr < b.addr+b.size {
			return b.node
		}
	}
	return 0
}

// create is ne_create_vm_ioctl.
func (n *Node) create(c *Call) Answer {
	if !slices.ContainsFunc(n.free, func(threads []uint32) bool { return len(threads) > 0 }) {
		return Answer{Errno: ErrNoCPUsAvailableInPool}
	}
	process, err := c.process()
	if err != nil {
		return Answer{Errno: unix.EIO}
	}
	slot := uint64(len(n.enclaves) + 1)
	e := &enclave{
		Enclave: Enclave{Slot: slot, Calls: []string{names[createVM]}},
		process: process, path: filepath.Join(n.options.Dir, fmt.Sprintf("enclave-%d", slot)),
		cores: make([][]uint32, len(n.free)), end: func() {}, disconnect: func() {},
	}
	fd, err := n.pipe(e)
	if err != nil {
		slog.Error("make enclave", "error", err)
		return Answer{Errno: unix.ENOMEM}
	}
	n.enclaves = append(n.enclaves, e)
	file := os.NewFile(uintptr(fd), e.path)
	if err := c.Write(c.Args[2], binary.LittleEndian.AppendUint64(nil, slot)); err != nil {
		file.Close()
		return Answer{Errno: unix.EFAULT}
	}
	return Answer{File: file}
}

// pipe makes the pipe whose reading end is the enclave's descriptor, and has its last close watched.
func (n *Node) pipe(e *enclave) (int, error) {
	if err := unix.Mkfifo(e.path, 0o600); err != nil {
		return 0, err
	}
	fd, err := unix.Open(e.path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	if e.hup, err = unix.Open(e.path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err != nil {
		unix.Close(fd)
		return 0, err
	}
	watch, err := unix.InotifyAddWatch(int(n.inotify.Fd()), e.path, unix.IN_CLOSE_NOWRITE)
	if err != nil {
		unix.Close(fd)
		unix.Close(e.hup)
		return 0, err
	}
	n.watches[int32(watch)] = e
	return fd, nil
}

// watch releases enclaves whose descriptor was closed.
func (n *Node) watch() {
	b := make([]byte, 4096)
	for {
		size, err := n.inotify.Read(b)
		if err != nil {
			return
		}
		for rest := b[:size]; len(rest) >= unix.SizeofInotifyEvent; {
			watch := int32(binary.NativeEndian.Uint32(rest))
			mask := binary.NativeEndian.Uint32(rest[4:])
			rest = rest[unix.SizeofInotifyEvent+binary.NativeEndian.Uint32(rest[12:]):]
			if mask&unix.IN_CLOSE_NOWRITE != 0 {
				n.mu.Lock()
				e := n.watches[watch]
				delete(n.watches, watch)
				n.mu.Unlock()
				if e != nil {
					n.release(e)
				}
			}
		}
	}
}

// release is ne_enclave_release.
func (n *Node) release(e *enclave) {
	n.mu.Lock()
	e.end()
	n.mu.Unlock()
	e.booted.Wait()
	n.mu.Lock()
	defer n.mu.Unlock()
	e.disconnect()
	e.hangUp()
	for i, threads := range e.cores {
		n.free[i] = append(n.free[i], threads...)
	}
	os.Remove(e.path)
	e.path = ""
	e.Calls = append(e.Calls, "close")
}

// hangUp tells the process that the enclave has ended.
func (e *enclave) hangUp() {
	if e.hup >= 0 {
		unix.Close(e.hup)
		e.hup = -1
	}
}

// request is ne_enclave_ioctl.
func (n *Node) request(e *enclave, request uint32, c *Call) unix.Errno {
	sizes := map[uint32]int{addVCPU: 4, getImageLoadInfo: 16, setUserMemoryRegion: 24, startEnclave: 16}
	if sizes[request] == 0 {
		return unix.ENOTTY
	}
	b, err := c.Read(c.Args[2], sizes[request])
	if err != nil {
		return unix.EFAULT
	}
	process, err := c.process()
	if err != nil {
		return unix.EIO
	}
	word := func(i int) uint64 { return binary.LittleEndian.Uint64(b[8*i:]) }
	var errno unix.Errno
	switch request {
	case addVCPU:
		cpu := binary.LittleEndian.Uint32(b)
		if errno = n.addVCPU(e, process, &cpu); errno == 0 {
			binary.LittleEndian.PutUint32(b, cpu)
		}
	case getImageLoadInfo:
		if e.state != stateInit {
			return ErrNotInInitState
		}
		if word(0) != 1 { // NE_EIF_IMAGE
			return ErrInvalidFlagValue
		}
		binary.LittleEndian.PutUint64(b[8:], loadOffset)
	case setUserMemoryRegion:
		if word(0) != 0 { // NE_DEFAULT_MEMORY_REGION
			return ErrInvalidFlagValue
		}
		if e.state != stateInit {
			return ErrNotInInitState
		}
		return n.setRegion(e, process, region{word(2), word(1)}, c)
	case startEnclave:
		cid := word(1)
		switch {
		case word(0) > 1: // NE_ENCLAVE_DEBUG_MODE
			return ErrInvalidFlagValue
		case cid == 1, cid == 2, cid == parentCID, cid >= 1<<32-1:
			return ErrInvalidEnclaveCID
		case e.state != stateInit:
			return ErrNotInInitState
		}
		if errno = n.start(e, uint32(cid), word(0) == 1); errno == 0 {
			binary.LittleEndian.PutUint64(b[8:], uint64(e.CID))
		}
	}
	if errno != 0 {
		return errno
	}
	if c.Write(c.Args[2], b) != nil {
		return unix.EFAULT
	}
	return 0
}

// addVCPU is the NE_ADD_VCPU case of ne_enclave_ioctl.
func (n *Node) addVCPU(e *enclave, process int, cpu *uint32) unix.Errno {
	if e.state != stateInit {
		return ErrNotInInitState
	}
	if *cpu >= uint32(n.options.CPUs) {
		return ErrInvalidVCPU
	}
	if slices.Contains(e.CPUs, *cpu) {
		return ErrVCPUAlreadyUsed
	}
	if *cpu == 0 { // the rest of a core first
		for _, threads := range e.cores {
			for _, t := range threads {
				if *cpu == 0 && !slices.Contains(e.CPUs, t) {
					*cpu = t
				}
			}
		}
	}
	if !slices.ContainsFunc(e.cores, func(threads []uint32) bool { return slices.Contains(threads, *cpu) }) {
		core := slices.IndexFunc(n.free, func(threads []uint32) bool {
			return len(threads) > 0 && (*cpu == 0 || slices.Contains(threads, *cpu))
		})
		switch {
		case core < 0 && *cpu == 0:
			return ErrNoCPUsAvailableInPool
		case core < 0:
			return ErrVCPUNotInCPUPool
		}
		e.cores[core], n.free[core] = n.free[core], nil
		if *cpu == 0 {
			*cpu = e.cores[core][0]
		}
	}
	if process != e.process {
		return unix.EIO
	}
	e.CPUs = append(e.CPUs, *cpu)
	return 0
}

// setRegion is ne_set_user_memory_region_ioctl.
func (n *Node) setRegion(e *enclave, process int, r region, c *Call) unix.Errno {
	const taskSize = 0x7ffffffff000 // TASK_SIZE_MAX (arch/x86/include/asm/page_64.h)
	switch {
	case process != e.process:
		return unix.EIO
	case r.size%pageSize != 0:
		return ErrInvalidMemRegionSize
	case r.addr%pageSize != 0:
		return ErrUnalignedMemRegion
	case r.size > taskSize || r.addr > taskSize-r.size:
		return ErrInvalidMemRegionAddr
	case r.size == 0:
		return unix.ENOMEM
	}
	for _, other := range e.regions {
		if r.addr < other.addr+other.size && other.addr < r.addr+r.size {
			return ErrMemRegionAlreadyUsed
		}
	}
	pieces, errno := n.pages(e, r, c)
	if errno != 0 {
		return errno
	}
	if n.options.MaxRegions > 0 && e.pieces+pieces > n.options.MaxRegions {
		return ErrMemMaxRegions
	}
	if err := e.take(r, c); err != nil {
		return unix.EFAULT
	}
	e.pieces += pieces
	e.regions = append(e.regions, r)
	e.Memory += r.size
	return 0
}

// take copies what there is of the EIF in a region that follows e.Memory bytes of others. What the process
// writes later does not reach the enclave.
func (e *enclave) take(r region, c *Call) error {
	if e.Memory+r.size <= loadOffset {
		return nil
	}
	from := max(e.Memory, loadOffset) - e.Memory
	if e.eifSize == 0 {
		header, err := c.Read(r.addr+from, headerSize)
		if err != nil {
			return err
		}
		e.eifSize = eifSize(header)
	}
	b, err := c.Read(r.addr+from, int(min(r.size-from, e.eifSize-uint64(len(e.EIF)))))
	e.EIF = append(e.EIF, b...)
	return err
}

// headerSize is that of an EIF (aws-nitro-enclaves-image-format, src/defs/mod.rs).
const headerSize = 548

// eifSize returns where the last section of an EIF ends, or 0 for what is none.
func eifSize(header []byte) (size uint64) {
	if string(header[:4]) != ".eif" {
		return 0
	}
	const sectionHeader, offsets, sizes = 12, 28, 28 + 32*8
	for i := range min(int(binary.BigEndian.Uint16(header[26:])), 32) {
		end := binary.BigEndian.Uint64(header[offsets+8*i:]) + sectionHeader + binary.BigEndian.Uint64(header[sizes+8*i:])
		size = max(size, end)
	}
	return size
}

// start is ne_start_enclave_ioctl.
func (n *Node) start(e *enclave, cid uint32, debug bool) unix.Errno {
	switch {
	case len(e.regions) == 0:
		return ErrNoMemRegionsAdded
	case e.Memory < minEnclaveMemory:
		return ErrEnclaveMemMinSize
	case len(e.CPUs) == 0:
		return ErrNoVCPUsAdded
	}
	for _, threads := range e.cores {
		for _, t := range threads {
			if !slices.Contains(e.CPUs, t) {
				return ErrFullCoresNotUsed
			}
		}
	}
	if len(e.EIF) == 0 || uint64(len(e.EIF)) != e.eifSize {
		return unix.EINVAL
	}
	if cid == 0 {
		cid = n.cid
		n.cid++
	}
	ports, disconnect, err := n.Ports.Connect(cid)
	if err != nil {
		slog.Error("connect enclave", "error", err)
		return unix.EINVAL
	}
	e.state, e.CID, e.Debug, e.Ports, e.Folder, e.disconnect = stateRunning, cid, debug, ports, n.Ports.Folder(cid), disconnect
	ctx, end := context.WithCancel(context.Background())
	e.end = end
	about := e.Enclave
	e.booted.Go(func() {
		if n.options.Boot == nil {
			<-ctx.Done()
		} else {
			n.options.Boot(ctx, about)
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		e.state = stateStopped
		e.hangUp()
	})
	return 0
}
