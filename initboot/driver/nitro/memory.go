package nitro

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pageSizes of which an enclave's memory can be made, the larger first: the hypervisor takes a limited
// number of pieces.
var pageSizes = []struct {
	bytes int64
	name  string
	flag  int
}{
	{1 << 30, "1 GiB", unix.MAP_HUGE_1GB},
	{2 << 20, "2 MiB", unix.MAP_HUGE_2MB},
}

// allocate maps at least size bytes of huge pages, all of one size and, unless node is negative, all on that
// NUMA node. Every page is there when it returns, so that none can be missing later.
func allocate(size int64, node int) ([]byte, error) {
	var failures []string
	for _, p := range pageSizes {
		pages := (size + p.bytes - 1) / p.bytes
		memory, err := mapPages(pages*p.bytes, p.flag, node)
		if err == nil {
			return memory, nil
		}
		failures = append(failures, fmt.Sprintf("%d of %s (%v)", pages, p.name, err))
	}
	where := ""
	if node >= 0 {
		where = fmt.Sprintf(" on the enclave pool's NUMA node %d", node)
	}
	return nil, fmt.Errorf("there are not enough free huge pages%s for initboot: it needs %s; raise memory_mib in the node's /etc/nitro_enclaves/allocator.yaml, or ask for less memory",
		where, strings.Join(failures, ", or "))
}

func mapPages(size int64, flag, node int) ([]byte, error) {
	memory, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_HUGETLB|flag)
	if err != nil {
		return nil, fmt.Errorf("mmap: %w", err)
	}
	if node >= 0 {
		err = bind(memory, node)
	}
	if err == nil {
		// A page that the pod's cgroup does not grant would otherwise be a SIGBUS.
		err = unix.Madvise(memory, unix.MADV_POPULATE_WRITE)
		switch {
		case errors.Is(err, unix.EINVAL):
			err = errors.New("Linux 5.14 or newer is needed")
		case errors.Is(err, unix.EFAULT): // where a page would be a SIGBUS
			err = errors.New("the pod's limit does not allow them")
		case err != nil:
			err = fmt.Errorf("populate: %w", err)
		}
	}
	if err != nil {
		unix.Munmap(memory)
		return nil, err
	}
	return memory, nil
}

// mpolBind is MPOL_BIND (include/uapi/linux/mempolicy.h).
const mpolBind = 2

// bind has the pages of memory taken from a NUMA node alone.
func bind(memory []byte, node int) error {
	var mask [16]uint64 // of 1024 nodes, the most that a kernel has
	mask[node/64] = 1 << (node % 64)
	_, _, errno := unix.Syscall6(unix.SYS_MBIND, uintptr(unsafe.Pointer(&memory[0])), uintptr(len(memory)), mpolBind,
		uintptr(unsafe.Pointer(&mask)), uintptr(len(mask)*64), 0)
	if errno != 0 {
		return fmt.Errorf("mbind: %w", errno)
	}
	return nil
}

// Where the kernel says which vCPUs are the enclave pool's, and where vCPUs are.
const (
	poolFile   = "/sys/module/nitro_enclaves/parameters/ne_cpus"
	nodeFolder = "/sys/devices/system/node"
	cpuFolder  = "/sys/devices/system/cpu"
)

// poolNode returns the NUMA node of the enclave pool, or -1 where there is no choice or no pool, which the
// device itself will say.
func poolNode() (int, error) {
	if nodes, err := numbered(nodeFolder, "node"); err != nil || len(nodes) < 2 {
		return -1, nil
	}
	b, err := os.ReadFile(poolFile)
	if err != nil {
		return -1, fmt.Errorf("read the enclave pool of the node: %w", err)
	}
	// A list as in Documentation/admin-guide/kernel-parameters.rst, "cpu lists"; all are of one node.
	first := strings.TrimSpace(string(b))
	if i := strings.IndexAny(first, ",-"); i >= 0 {
		first = first[:i]
	}
	if first == "" {
		return -1, nil
	}
	if _, err := strconv.ParseUint(first, 10, 16); err != nil {
		return -1, fmt.Errorf("%s says %q, which is no list of vCPUs", poolFile, b)
	}
	// The pool's vCPUs are offline, so the lists of a node's vCPUs do not have them.
	nodes, err := numbered(cpuFolder+"/cpu"+first, "node")
	if err != nil || len(nodes) != 1 || nodes[0] >= 1024 {
		return -1, fmt.Errorf("find the NUMA node of vCPU %s of the enclave pool: %v %w", first, nodes, err)
	}
	return nodes[0], nil
}

// numbered returns N of every entry prefixN of a folder.
func numbered(folder, prefix string) ([]int, error) {
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil, err
	}
	var numbers []int
	for _, e := range entries {
		if n, ok := strings.CutPrefix(e.Name(), prefix); ok {
			if i, err := strconv.Atoi(n); err == nil && i >= 0 {
				numbers = append(numbers, i)
			}
		}
	}
	return numbers, nil
}
