package usage

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// proc writes files of a /proc.
func proc(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestMachine(t *testing.T) {
	m := New(true)
	m.proc = proc(t, map[string]string{
		"meminfo": "MemTotal:         1000 kB\nMemFree:           100 kB\nMemAvailable:      400 kB\n",
		"stat":    "cpu  100 20 30 4000 500 6 7 800 9 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n",
	})
	got, err := m.Read()
	if err != nil {
		t.Fatal(err)
	}
	want := Usage{MemoryUsed: 600 << 10, MemoryTotal: 1000 << 10, CPU: 1630 * time.Millisecond}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestProcesses(t *testing.T) {
	m := New(false)
	m.proc = proc(t, map[string]string{
		"1/status": "Name:\tinit\nVmRSS:\t 900 kB\nRssAnon:\t 200 kB\n",
		"1/stat":   "1 (init) S 0 1 1 0 -1 4194560 1 2 3 4 10 20 30 40 20 0 1 0 5\n",
		"7/status": "Name:\t) S 9\nRssAnon:\t  50 kB\n",
		"7/stat":   "7 () S 9) R 1 1 1 0 -1 4194560 1 2 3 4 1 2 3 4 20 0 1 0 5\n",
		"8/status": "Name:\tzombie\n",
		"8/stat":   "8 (zombie) Z 1 1 1 0 -1 4194560 1 2 3 4 0 0 0 0 20 0 1 0 5\n",
	})
	got, err := m.Read()
	if err != nil {
		t.Fatal(err)
	}
	want := Usage{MemoryUsed: 250 << 10, CPU: 1100 * time.Millisecond}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}

	// A process has ended and its parent has not reaped it yet.
	if err := os.RemoveAll(filepath.Join(m.proc, "7")); err != nil {
		t.Fatal(err)
	}
	got, err = m.Read()
	if err != nil {
		t.Fatal(err)
	}
	if got.CPU != want.CPU {
		t.Errorf("CPU time went from %s to %s", want.CPU, got.CPU)
	}
}

func TestRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		whole bool
		files map[string]string
	}{
		"no meminfo":     {true, nil},
		"no total":       {true, map[string]string{"meminfo": "MemAvailable: 1 kB\n"}},
		"no CPU line":    {true, map[string]string{"meminfo": "MemTotal: 1 kB\nMemAvailable: 1 kB\n", "stat": "intr 1\n"}},
		"CPU not number": {true, map[string]string{"meminfo": "MemTotal: 1 kB\nMemAvailable: 1 kB\n", "stat": "cpu a b c d e f g h\n"}},
		"short stat":     {false, map[string]string{"1/status": "", "1/stat": "1 (init) S 0"}},
	} {
		t.Run(name, func(t *testing.T) {
			m := New(tt.whole)
			m.proc = proc(t, tt.files)
			if u, err := m.Read(); err == nil {
				t.Errorf("read %+v", u)
			}
		})
	}
}

// TestHere reads what runs the test.
func TestHere(t *testing.T) {
	for name, m := range map[string]*Meter{"machine": New(true), "processes": New(false, "/dev/shm")} {
		t.Run(name, func(t *testing.T) {
			u, err := m.Read()
			if err != nil {
				t.Fatal(err)
			}
			if u.MemoryUsed == 0 || u.MemoryTotal == 0 || u.CPU == 0 {
				t.Errorf("read %+v", u)
			}
		})
	}
}
