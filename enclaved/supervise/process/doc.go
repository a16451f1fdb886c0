// Package process runs the workload: it turns the workload manifest and the image's configuration into
// one description of a process, starts it as PID 1 of namespaces of its own with the unpacked image as
// its root, runs further commands beside it, and reaps what is left over.
//
// Both kinds of process go through a helper: the program itself, started again as "PROGRAM workload" or
// "PROGRAM exec", which prepares itself and becomes the command. Whoever uses Start or Exec calls Helper
// first thing in main.
package process
