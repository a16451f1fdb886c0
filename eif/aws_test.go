package eif

import (
	"encoding/json"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite testdata/aws with the program that EIF_PEER names")

// registers are what AWS's tools print.
type registers struct{ PCR0, PCR1, PCR2, PCR8 string }

// awsCase is an EIF that AWS's library has built: testdata/aws/NAME.eif, with NAME.json, what it printed.
type awsCase struct {
	img   Image
	curve string // signed by testdata/aws/CURVE.key.pem
}

func awsCases(t *testing.T) map[string]awsCase {
	kernel := func() Data { return strings.NewReader(strings.Repeat("kernel", 100)) }
	ramdisks := func(n int) []Data {
		var out []Data
		for i := range n {
			out = append(out, strings.NewReader(strings.Repeat("ramdisk", i)))
		}
		return out
	}
	metadata := func(docker, custom string) *Metadata {
		return &Metadata{ImageName: "näme \"q\" <&>\u2028\x01", ImageVersion: "1.0",
			BuildMetadata: BuildMetadata{"2024-01-02T03:04:05.000000006+00:00", "nitro-cli", "1.4.2", "Linux", "6.1.90"},
			DockerInfo:    json.RawMessage(docker), CustomMetadata: json.RawMessage(custom)}
	}
	// Of these serde_json reads some not as the nearest number.
	const numbers = `[123456789012345678901234567890, 1844674407370955161600.05, 0.12345678901234567890123, 1.7976931348623157e308, 5e-324, 1e-400, 0e999999999999, 1E+2, 4.35e-310, 9007199254740993.0, 0, -0, 1.0, 1e2, 0.1, 1e15, 1e16, 123456789012345680000.0, 0.00001, 0.000001, 1.5e-7, 1.5e300, 18446744073709551615, 18446744073709551616, -9223372036854775808]`
	cases := map[string]awsCase{
		"one_ramdisk": {img: Image{Arch: X86_64, Kernel: kernel(), Cmdline: "reboot=k panic=30", Metadata: metadata("null", "null"), Ramdisks: ramdisks(1)}},
		"aarch64":     {img: Image{Arch: AArch64, Kernel: kernel(), Cmdline: "", Metadata: metadata("null", "null"), Ramdisks: ramdisks(3)}},
		"29_ramdisks": {img: Image{Arch: X86_64, Kernel: kernel(), Cmdline: "quiet", Metadata: metadata("null", "null"), Ramdisks: ramdisks(MaxRamdisks)}},
		"metadata": {img: Image{Arch: X86_64, Kernel: kernel(), Cmdline: "quiet", Ramdisks: ramdisks(2),
			Metadata: metadata(`[{"b": {"d": [], "c": {}}, "a": null}]`, `{"z": "\u0000\b\f\n\r\t\u001f\u007f\"\\\/é\ud83d\ude00", "a": [true, false], "é": {}, "n": `+numbers+`}`)}},
	}
	for curve, n := range map[string]int{"p256": 1, "p384": 2, "p521": MaxRamdisks - 1} {
		read := func(suffix string) []byte {
			b, err := os.ReadFile(filepath.Join("testdata/aws", curve+suffix))
			if err != nil {
				t.Fatal(err)
			}
			return b
		}
		signer, err := NewSigner(read(".cert.pem"), read(".key.pem"))
		if err != nil {
			t.Fatal(err)
		}
		cases["signed_"+curve] = awsCase{curve: curve,
			img: Image{Arch: X86_64, Kernel: kernel(), Cmdline: "quiet", Metadata: metadata("null", "null"), Ramdisks: ramdisks(n), Signer: signer}}
	}
	return cases
}

// TestAWS compares with what AWS's library builds. With EIF_PEER, the program of hack/eif-peer, it builds
// anew and AWS's library reads ours; see hack/eif-interop.sh.
func TestAWS(t *testing.T) {
	peer := os.Getenv("EIF_PEER")
	for name, tc := range awsCases(t) {
		t.Run(name, func(t *testing.T) {
			golden := filepath.Join("testdata/aws", name)
			if peer != "" {
				output := filepath.Join(t.TempDir(), name)
				if *update {
					output = golden
				}
				printed := buildAWS(t, peer, output+".eif", tc)
				if err := os.WriteFile(output+".json", printed, 0o644); err != nil {
					t.Fatal(err)
				}
				golden = output
			}
			aws, err := os.ReadFile(golden + ".eif")
			if err != nil {
				t.Fatal(err)
			}
			printed, err := os.ReadFile(golden + ".json")
			if err != nil {
				t.Fatal(err)
			}
			var want registers
			if err := json.Unmarshal(printed, &want); err != nil {
				t.Fatal(err)
			}
			compareAWS(t, aws, want, tc.img)
			if peer != "" {
				readByAWS(t, peer, want, tc.img)
			}
		})
	}
}

// buildAWS builds an EIF with AWS's library and returns the registers that it printed.
func buildAWS(t *testing.T, peer, output string, tc awsCase) []byte {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	content := func(d Data) []byte {
		b := make([]byte, d.Size())
		if n, err := d.ReadAt(b, 0); n != len(b) {
			t.Fatal(err)
		}
		return b
	}
	metadata, err := json.Marshal(tc.img.Metadata)
	if err != nil {
		t.Fatal(err)
	}
	key, cert := "-", "-"
	if tc.curve != "" {
		key, cert = "testdata/aws/"+tc.curve+".key.pem", "testdata/aws/"+tc.curve+".cert.pem"
	}
	args := []string{"build", write("metadata", metadata), output, write("kernel", content(tc.img.Kernel)), tc.img.Cmdline, string(tc.img.Arch), key, cert}
	for i, r := range tc.img.Ramdisks {
		args = append(args, write("ramdisk"+string(rune('a'+i)), content(r)))
	}
	return runPeer(t, peer, args...)
}

// readByAWS lets AWS's library read what we write, check the checksum and the signature, and measure it.
func readByAWS(t *testing.T, peer string, want registers, img Image) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "ours.eif")
	var f memFile
	if _, err := Write(&f, img); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, f.data, 0o600); err != nil {
		t.Fatal(err)
	}
	var got registers
	if err := json.Unmarshal(runPeer(t, peer, "read", file), &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("AWS's reader measures ours otherwise (-want +got):\n%s", diff)
	}

	// That it checks at all: one bit of the kernel is another.
	f.data[headerSize+sectionHeaderSize] ^= 1
	if err := os.WriteFile(file, f.data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := exec.CommandContext(t.Context(), peer, "read", file).Run(); err == nil {
		t.Error("AWS's reader takes a damaged file")
	}
}

func runPeer(t *testing.T, peer string, args ...string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), peer, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", peer, args[0], err, stderr.String())
	}
	return out
}
