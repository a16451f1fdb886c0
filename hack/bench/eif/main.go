// Command eif compares the cost of building an enclave image file from a ramdisk of 300 MB: that of
// `cloister eif build` and of AWS's builder, with that of one `openssl dgst -sha384` of the same ramdisk.
//
// Measured are the user CPU time and the peak resident memory of whole processes (wait4), in rounds that take
// turns, so that whatever else the machine does hits all alike; printed are medians, those of the ratios round
// by round. It fails if ours costs more than the limits.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"cloister.dev/cloister/hack/bench/cpu"
)

const (
	rounds    = 7
	size      = 300_000_000 // of the large ramdisk, in bytes
	maxRatio  = 3.2
	maxMemory = 40 << 20
)

// contender is a command that is measured.
type contender struct {
	name   string
	args   []string
	ours   bool
	pcrs   string // the registers that it prints, if it builds
	times  []time.Duration
	memory []int64 // bytes
}

func main() {
	log.SetFlags(0)
	if len(os.Args) != 3 && len(os.Args) != 4 {
		log.Fatal("usage: eif FOLDER CLOISTER [EIF-PEER]: a folder for 1 GB of files, and programs")
	}
	at := func(name string) string { return filepath.Join(os.Args[1], name) }
	random(at("kernel"), 8<<20)
	random(at("small"), 4<<20)
	random(at("large"), size)
	if err := os.WriteFile(at("metadata.json"), []byte(`{"ImageName":"","ImageVersion":"","BuildMetadata":{"BuildTime":"","BuildTool":"","BuildToolVersion":"","OperatingSystem":"","KernelVersion":""},"DockerInfo":null,"CustomMetadata":null}`), 0o600); err != nil {
		log.Fatal(err)
	}
	cloister := func(ramdisks ...string) []string {
		args := []string{os.Args[2], "eif", "build", "-o", "json", "--kernel", at("kernel"), "--cmdline", "quiet", "--output", at("ours.eif")}
		for _, r := range ramdisks {
			args = append(args, "--ramdisk", r)
		}
		return args
	}
	list := []*contender{
		{name: "`openssl dgst -sha384` of the ramdisk", args: []string{"openssl", "dgst", "-sha384", at("large")}},
		{name: "Cloister, as the only ramdisk", ours: true, args: cloister(at("large"))},
		{name: "Cloister, as the second of two", ours: true, args: cloister(at("small"), at("large"))},
	}
	if len(os.Args) == 4 {
		aws := func(ramdisks ...string) []string {
			return append([]string{os.Args[3], "build", at("metadata.json"), at("aws.eif"), at("kernel"), "quiet", "x86_64", "-", "-"}, ramdisks...)
		}
		list = append(list,
			&contender{name: "AWS's builder, as the only ramdisk", args: aws(at("large"))},
			&contender{name: "AWS's builder, as the second of two", args: aws(at("small"), at("large"))})
	}
	for range rounds {
		for _, c := range list {
			c.run()
		}
	}
	if len(list) == 5 && (list[1].pcrs != list[3].pcrs || list[2].pcrs != list[4].pcrs) {
		log.Fatal("AWS's builder and ours print other registers")
	}
	fmt.Println("| a ramdisk of 300 MB | user CPU, s | of that of openssl | peak memory, MB |")
	fmt.Println("|---|---|---|---|")
	exceeded := false
	for _, c := range list {
		ratios := make([]float64, rounds)
		for i := range ratios {
			ratios[i] = float64(c.times[i]) / float64(list[0].times[i])
		}
		ratio, memory := cpu.Median(ratios), cpu.Median(c.memory)
		fmt.Printf("| %s | %.2f | %.2f | %.0f |\n", c.name, cpu.Median(c.times).Seconds(), ratio, float64(memory)/1e6)
		exceeded = exceeded || c.ours && (ratio > maxRatio || memory > maxMemory)
	}
	if exceeded {
		log.Fatalf("ours may cost %.1f times openssl and %d MiB", maxRatio, maxMemory>>20)
	}
}

func (c *contender) run() {
	var out bytes.Buffer
	cmd := exec.Command(c.args[0], c.args[1:]...)
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	if err := cmd.Run(); err != nil {
		log.Fatalf("%s: %v", c.name, err)
	}
	usage := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	c.times = append(c.times, cmd.ProcessState.UserTime())
	c.memory = append(c.memory, usage.Maxrss<<10)

	// nitro-cli, and so ours, prints under a name what AWS's library returns.
	type registers struct{ PCR0, PCR1, PCR2 string }
	var printed struct {
		registers
		Measurements *registers
	}
	if json.Unmarshal(out.Bytes(), &printed) == nil {
		if printed.Measurements != nil {
			printed.registers = *printed.Measurements
		}
		c.pcrs = fmt.Sprint(printed.registers)
	}
}

// random writes a file of random bytes, the same ones every time.
func random(name string, n int64) {
	f, err := os.Create(name)
	if err != nil {
		log.Fatal(err)
	}
	if _, err := io.CopyN(f, rand.NewChaCha8([32]byte{1}), n); err != nil {
		log.Fatal(err)
	}
	if err := f.Close(); err != nil {
		log.Fatal(err)
	}
}
