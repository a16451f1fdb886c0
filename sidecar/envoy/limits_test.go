package envoy

import (
	"math"
	"testing"
)

func TestWorkers(t *testing.T) {
	tests := map[string]int{
		"max 100000\n":     1,
		"10000 100000\n":   1,
		"100000 100000\n":  1,
		"100001 100000\n":  2,
		"250000 100000\n":  3,
		"-1 100000\n":      1,
		"100000 0\n":       1,
		"100000":           1,
		"":                 1,
		"200000 100000 \n": 2,
	}
	for limit, want := range tests {
		if got := workers(limit); got != want {
			t.Errorf("workers(%q) = %d, want %d", limit, got, want)
		}
	}
}

func TestConnections(t *testing.T) {
	tests := map[string]int64{
		"max\n":       math.MaxInt64,
		"":            math.MaxInt64,
		"134217728\n": 2048, // 128Mi
		"1048576\n":   1,
	}
	for limit, want := range tests {
		if got := connections(limit); got != want {
			t.Errorf("connections(%q) = %d, want %d", limit, got, want)
		}
	}
}
