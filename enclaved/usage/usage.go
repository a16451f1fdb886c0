// Package usage reads how much memory and CPU time an enclave uses.
package usage

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// userHZ is the unit of CPU times in /proc, per second (proc_pid_stat(5): sysconf(_SC_CLK_TCK), which is
// 100 on every architecture that has enclaves).
const userHZ = 100

// Usage of an enclave.
type Usage struct {
	// MemoryUsed and MemoryTotal are in bytes. Files count as memory, for there is no disk.
	MemoryUsed, MemoryTotal uint64
	// CPU is the time of all processes since the start. It never shrinks.
	CPU time.Duration
}

// Meter reads the usage of one enclave. It is safe for concurrent use.
type Meter struct {
	proc  string
	whole bool
	files []string

	mu  sync.Mutex
	cpu time.Duration // the most that was ever read
}

// New returns a meter. Whole says that the enclave is a machine of its own, whose kernel keeps the
// accounts. Otherwise it is the processes that /proc shows and the file systems that hold the files (each
// a tmpfs); the first of these is as large as the enclave's memory.
func New(whole bool, files ...string) *Meter {
	return &Meter{proc: "/proc", whole: whole, files: files}
}

// Read returns the usage at this moment.
func (m *Meter) Read() (Usage, error) {
	read := m.processes
	if m.whole {
		read = m.machine
	}
	u, err := read()
	if err != nil {
		return Usage{}, fmt.Errorf("read usage of the enclave: %w", err)
	}
	// A process that ends while /proc is being read may be missed by both counts.
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cpu = max(m.cpu, u.CPU)
	u.CPU = m.cpu
	return u, nil
}

// machine asks the kernel.
func (m *Meter) machine() (u Usage, err error) {
	meminfo, err := os.ReadFile(filepath.Join(m.proc, "meminfo"))
	if err != nil {
		return u, err
	}
	if u.MemoryTotal, err = kibibytes(string(meminfo), "MemTotal"); err != nil {
		return u, err
	}
	available, err := kibibytes(string(meminfo), "MemAvailable")
	if err != nil {
		return u, err
	}
	u.MemoryUsed = u.MemoryTotal - min(available, u.MemoryTotal)
	stat, err := os.ReadFile(filepath.Join(m.proc, "stat"))
	if err != nil {
		return u, err
	}
	// cpu user nice system idle iowait irq softirq steal …: idle, iowait and steal are nobody's work
	// (proc_stat(5)).
	f := strings.Fields(string(stat))
	if len(f) < 8 || f[0] != "cpu" {
		return u, errors.New("/proc/stat does not begin with the time of all CPUs")
	}
	u.CPU, err = ticks(f[1], f[2], f[3], f[6], f[7])
	return u, err
}

// processes adds up. What several processes share without a file is counted for none of them.
func (m *Meter) processes() (u Usage, err error) {
	for i, dir := range m.files {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			return u, fmt.Errorf("look at %s: %w", dir, err)
		}
		if i == 0 {
			u.MemoryTotal = st.Blocks * uint64(st.Bsize)
		}
		u.MemoryUsed += (st.Blocks - st.Bfree) * uint64(st.Bsize)
	}
	dirs, err := filepath.Glob(filepath.Join(m.proc, "[0-9]*"))
	if err != nil {
		return u, err
	}
	for _, dir := range dirs {
		status, err1 := os.ReadFile(filepath.Join(dir, "status"))
		stat, err2 := os.ReadFile(filepath.Join(dir, "stat"))
		if err1 != nil || err2 != nil { // it has ended
			continue
		}
		// A zombie has no memory, and no such line.
		if anon, err := kibibytes(string(status), "RssAnon"); err == nil {
			u.MemoryUsed += anon
		}
		cpu, err := processTime(string(stat))
		if err != nil {
			return u, err
		}
		u.CPU += cpu
	}
	return u, nil
}

// kibibytes reads a line "NAME: N kB" and returns bytes.
func kibibytes(text, name string) (uint64, error) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 3 && f[0] == name+":" && f[2] == "kB" {
			n, err := strconv.ParseUint(f[1], 10, 53)
			return n << 10, err
		}
	}
	return 0, fmt.Errorf("there is no %s", name)
}

// processTime reads utime, stime, cutime and cstime, fields 14 to 17 of /proc/PID/stat: the process and
// those of its children that have ended and been reaped, each of which is counted there only. The second
// field is a name in parentheses, which can hold anything.
func processTime(stat string) (time.Duration, error) {
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(f) < 15 {
		return 0, errors.New("/proc/PID/stat is too short")
	}
	return ticks(f[11:15]...)
}

func ticks(numbers ...string) (sum time.Duration, err error) {
	for _, s := range numbers {
		n, err := strconv.ParseInt(s, 10, 53)
		if err != nil {
			return 0, fmt.Errorf("read CPU time: %w", err)
		}
		sum += time.Duration(n) * (time.Second / userHZ)
	}
	return sum, nil
}
