// Package cpu is what the benchmarks of this module measure with.
package cpu

import (
	"log"
	"slices"
	"syscall"
	"time"
)

// Time is what the process has used of the CPU, in user and system mode.
func Time() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		log.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// Median returns the upper median.
func Median[T interface{ ~int64 | ~uint64 | ~float64 }](list []T) T {
	sorted := slices.Clone(list)
	slices.Sort(sorted)
	return sorted[len(sorted)/2]
}
