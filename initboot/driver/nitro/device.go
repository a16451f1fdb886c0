package nitro

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// device is where enclaves are made.
const device = "/dev/nitro_enclaves"

// request is an ioctl of the device or of an enclave.
type request struct {
	name   string
	number uintptr
}

var (
	createVM            = request{"NE_CREATE_VM", 0x8008AE20}
	addVCPU             = request{"NE_ADD_VCPU", 0xC004AE21}
	getImageLoadInfo    = request{"NE_GET_IMAGE_LOAD_INFO", 0xC010AE22}
	setUserMemoryRegion = request{"NE_SET_USER_MEMORY_REGION", 0x4018AE23}
	startEnclave        = request{"NE_START_ENCLAVE", 0xC010AE24}
)

// eifImage is NE_EIF_IMAGE, a flag of struct ne_image_load_info.
const eifImage = 1

// imageLoadInfo is struct ne_image_load_info.
type imageLoadInfo struct {
	flags        uint64
	memoryOffset uint64 // out, bytes
}

// userMemoryRegion is struct ne_user_memory_region.
type userMemoryRegion struct {
	flags         uint64
	memorySize    uint64 // bytes
	userspaceAddr uint64
}

// startInfo is struct ne_enclave_start_info.
type startInfo struct {
	flags uint64
	cid   uint64 // 0: any, and out
}

// ioctl calls a request on fd. Its errors are sentences.
func ioctl(fd uintptr, r request, arg unsafe.Pointer) (uintptr, error) {
	result, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, r.number, uintptr(arg))
	if errno != 0 {
		return 0, fmt.Errorf("%s: %w", r.name, Error(errno))
	}
	return result, nil
}

// Error is an error number of the device, those of the driver itself (NE_ERR_*) among them, which no C
// library has words for.
type Error unix.Errno

// sentences say what is wrong and what to do.
var sentences = map[Error]string{
	256: "the vCPU belongs to the enclave already (NE_ERR_VCPU_ALREADY_USED): this is a bug of initboot, report it",
	257: "the vCPU is not in the node's enclave pool (NE_ERR_VCPU_NOT_IN_CPU_POOL): this is a bug of initboot, which leaves the choice to the device; report it",
	258: "the vCPU's core is not one of the node's enclave pool (NE_ERR_VCPU_INVALID_CPU_CORE): set the pool again, by cpu_count in /etc/nitro_enclaves/allocator.yaml and a restart of nitro-enclaves-allocator.service",
	259: "the memory is not a multiple of 2 MiB (NE_ERR_INVALID_MEM_REGION_SIZE): this is a bug of initboot, report it",
	260: "the memory is not in initboot's address space (NE_ERR_INVALID_MEM_REGION_ADDR): this is a bug of initboot, report it",
	261: "the memory does not begin at a multiple of 2 MiB (NE_ERR_UNALIGNED_MEM_REGION_ADDR): this is a bug of initboot, report it",
	262: "the memory belongs to the enclave already (NE_ERR_MEM_REGION_ALREADY_USED): this is a bug of initboot, report it",
	263: "the memory is not made of huge pages (NE_ERR_MEM_NOT_HUGE_PAGE): this is a bug of initboot, report it",
	264: "the huge pages are on another NUMA node than the enclave pool's vCPUs (NE_ERR_MEM_DIFFERENT_NUMA_NODE): reserve the pages on the pool's node, as nitro-enclaves-allocator.service does, and not by the kernel's command line",
	265: "the memory is in more pieces than the hypervisor takes (NE_ERR_MEM_MAX_REGIONS): install with HUGEPAGES=1Gi and reserve pages of 1 GiB when the node starts, or ask for less memory",
	266: "the enclave has no memory (NE_ERR_NO_MEM_REGIONS_ADDED): this is a bug of initboot, report it",
	267: "the enclave has no vCPUs (NE_ERR_NO_VCPUS_ADDED): set cpus in cloister.dev/config to 2 or more",
	268: "the enclave has less than 64 MiB of memory (NE_ERR_ENCLAVE_MEM_MIN_SIZE): set memory in cloister.dev/config, or the container's memory limit, to 64Mi or more",
	269: "the vCPUs do not make full cores (NE_ERR_FULL_CORES_NOT_USED): set cpus in cloister.dev/config to a multiple of the node's threads per core, which is 2 with Intel and AMD",
	270: "the enclave has been started already (NE_ERR_NOT_IN_INIT_STATE): this is a bug of initboot, report it",
	271: "the vCPU is none of this node's (NE_ERR_INVALID_VCPU): this is a bug of initboot, which leaves the choice to the device; report it",
	272: "no vCPU of the node's enclave pool is free (NE_ERR_NO_CPUS_AVAIL_IN_POOL): raise cpu_count in /etc/nitro_enclaves/allocator.yaml and restart nitro-enclaves-allocator.service, or run fewer enclaves on the node; ENCLAVE_CPUS=true lets the scheduler count them",
	273: "the memory's pages are not multiples of 2 MiB (NE_ERR_INVALID_PAGE_SIZE): reserve huge pages of 2 MiB or 1 GiB on the node",
	274: "the device does not know a flag (NE_ERR_INVALID_FLAG_VALUE): this is a bug of initboot, report it with the node's kernel version",
	275: "the enclave cannot have the context id (NE_ERR_INVALID_ENCLAVE_CID): this is a bug of initboot, which leaves the choice to the device; report it",

	Error(unix.ENOENT): "there is no " + device + ": run the pod on an instance with enclaves enabled (EnclaveOptions), with the kernel module nitro_enclaves and AWS's device plugin",
	Error(unix.EACCES): "initboot may not open " + device + ": set DEVICE_GROUP to the gid that the node gives the device, or leave it empty, which makes initboot root",
	Error(unix.EPERM):  "the container may not use " + device + ": initboot must ask for aws.ec2.nitro/nitro_enclaves, and AWS's device plugin must run on the node",
	Error(unix.ENODEV): device + " has no hypervisor behind it: enable enclaves for the instance (EnclaveOptions)",
	Error(unix.EIO):    "another process than the one that made the enclave has used it, or the hypervisor failed: look at the node's kernel log",
	Error(unix.ENOMEM): "the kernel or the hypervisor has no memory for the enclave: ask for less memory, or look at the node's kernel log",
	Error(unix.EBUSY):  "the hypervisor has no room for another enclave: an instance runs 4 at most; run fewer on the node",
}

// Error says what is wrong and what to do.
func (e Error) Error() string {
	if s, ok := sentences[e]; ok {
		return s
	}
	return fmt.Sprintf("%v (error %d): look at the node's kernel log, where the driver nitro_enclaves says more", unix.Errno(e), int(e))
}

// Is makes an Error one of the errors of unix and of io/fs.
func (e Error) Is(target error) bool { return unix.Errno(e).Is(target) || target == unix.Errno(e) }
