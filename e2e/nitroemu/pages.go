package nitroemu

import (
	"encoding/binary"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mapping is an entry of /proc/PID/smaps.
type mapping struct {
	start, end uint64
	page       uint64 // size in bytes
	huge       bool   // of hugetlbfs
}

// mappings reads /proc/PID/smaps (Documentation/filesystems/proc.rst).
func (c *Call) mappings() ([]mapping, error) {
	b, err := os.ReadFile(c.proc("smaps"))
	if err != nil {
		return nil, err
	}
	var list []mapping
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		switch {
		case f[0] == "KernelPageSize:":
			kb, err := strconv.ParseUint(f[1], 10, 64)
			if err != nil {
				return nil, err
			}
			list[len(list)-1].page = kb << 10
		case f[0] == "VmFlags:":
			list[len(list)-1].huge = slices.Contains(f, "ht")
		case !strings.HasSuffix(f[0], ":"):
			from, to, _ := strings.Cut(f[0], "-")
			start, err := strconv.ParseUint(from, 16, 64)
			if err != nil {
				return nil, err
			}
			end, err := strconv.ParseUint(to, 16, 64)
			if err != nil {
				return nil, err
			}
			list = append(list, mapping{start: start, end: end})
		}
	}
	return list, nil
}

// pages checks each page of a region and counts the pieces that are contiguous in the machine's memory.
func (n *Node) pages(e *enclave, r region, c *Call) (pieces int, errno unix.Errno) {
	mappings, err := c.mappings()
	if err != nil {
		return 0, unix.EIO
	}
	pagemap, err := os.Open(c.proc("pagemap"))
	if err != nil {
		return 0, unix.EIO
	}
	defer pagemap.Close()
	var next uint64 // frame that would be contiguous
	for addr := r.addr; addr < r.addr+r.size; {
		i := slices.IndexFunc(mappings, func(m mapping) bool { return m.start <= addr && addr < m.end })
		if i < 0 {
			return 0, unix.EFAULT
		}
		m := mappings[i]
		if _, err := c.Read(addr, 1); err != nil { // and so it is there
			return 0, unix.EFAULT
		}
		switch {
		case !m.huge:
			return 0, ErrMemNotHugePage
		case m.page%pageSize != 0:
			return 0, ErrInvalidPageSize
		case n.numaNode(e.process, addr) != n.options.NUMANode:
			return 0, ErrMemDifferentNUMANode
		}
		// Documentation/admin-guide/mm/pagemap.rst: 8 bytes a page of 4 KiB, the low 55 bits are its frame.
		const small = 4096
		b := make([]byte, 8)
		if _, err := pagemap.ReadAt(b, int64(addr/small*8)); err != nil {
			return 0, unix.EIO
		}
		frame := binary.NativeEndian.Uint64(b) & (1<<55 - 1)
		if frame != next || pieces == 0 {
			pieces++
		}
		next = frame + m.page/small
		addr += m.page
	}
	return pieces, 0
}
