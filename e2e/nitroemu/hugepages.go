package nitroemu

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// HugePages has the machine keep count huge pages of a size in bytes more than it does, until the test ends,
// or skips the test where it cannot.
func HugePages(t testing.TB, size, count int) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("huge pages need root")
	}
	if got := addHugePages(t, size, count); got < count {
		addHugePages(t, size, -got)
		t.Skipf("the machine has no memory for %d huge pages of %d bytes", count, size)
	}
	t.Cleanup(func() { addHugePages(t, size, -count) })
}

// addHugePages changes the number that the machine keeps, of which tests of other packages may have a share
// (Documentation/admin-guide/mm/hugetlbpage.rst), and returns by how much it did.
func addHugePages(t testing.TB, size, count int) int {
	t.Helper()
	lock, err := os.OpenFile(filepath.Join(os.TempDir(), "cloister-test-hugepages.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join("/sys/kernel/mm/hugepages", "hugepages-"+strconv.Itoa(size>>10)+"kB", "nr_hugepages")
	read := func() int {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Skip(err)
		}
		n, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := read()
	if err := os.WriteFile(path, []byte(strconv.Itoa(max(before+count, 0))), 0o644); err != nil {
		t.Fatal(err)
	}
	return read() - before
}
