package eif

import (
	"bytes"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// vectors holds EIFs that AWS's library built, with their inputs and registers. They are not part
// of the repository.
const vectors = "../../shared/vectors/eif"

func vector(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(vectors, name))
	if errors.Is(err, os.ErrNotExist) {
		t.Skipf("no test vectors: %s is absent", vectors)
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// memFile is an io.WriteSeeker in memory.
type memFile struct {
	data []byte
	pos  int64
}

func (f *memFile) Write(p []byte) (int, error) {
	if end := f.pos + int64(len(p)); end > int64(len(f.data)) {
		f.data = append(f.data, make([]byte, end-int64(len(f.data)))...)
	}
	copy(f.data[f.pos:], p)
	f.pos += int64(len(p))
	return len(p), nil
}

func (f *memFile) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekStart:
		f.pos = offset
	case io.SeekCurrent:
		f.pos += offset
	default:
		return 0, errors.New("not supported")
	}
	return f.pos, nil
}

// rawSection is a section of a file that assemble lays out.
type rawSection struct {
	typ  SectionType
	data []byte
}

// assemble lays out a file independently of Write.
func assemble(sections ...rawSection) []byte {
	b := []byte(".eif")
	b = binary.BigEndian.AppendUint16(b, 4)
	b = binary.BigEndian.AppendUint16(b, 0)
	b = binary.BigEndian.AppendUint64(b, 1<<30)
	b = binary.BigEndian.AppendUint64(b, 2)
	b = binary.BigEndian.AppendUint16(b, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(len(sections)))
	var offsets, sizes [32]uint64
	at := uint64(548)
	for i, s := range sections {
		offsets[i], sizes[i] = at, uint64(len(s.data))
		at += 12 + sizes[i]
	}
	for _, v := range append(offsets[:], sizes[:]...) {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	b = binary.BigEndian.AppendUint64(b, 0) // unused, CRC
	for _, s := range sections {
		b = binary.BigEndian.AppendUint16(b, uint16(s.typ))
		b = binary.BigEndian.AppendUint16(b, 0)
		b = binary.BigEndian.AppendUint64(b, uint64(len(s.data)))
		b = append(b, s.data...)
	}
	return fixCRC(b)
}

func fixCRC(b []byte) []byte {
	crc := crc32.NewIEEE()
	crc.Write(b[:544])
	crc.Write(b[548:])
	binary.BigEndian.PutUint32(b[544:], crc.Sum32())
	return b
}

// valid is a small EIF with everything but a signature.
func valid() []byte {
	return assemble(
		rawSection{SectionKernel, []byte("kernel")},
		rawSection{SectionCmdline, []byte("reboot=k")},
		rawSection{SectionMetadata, []byte(`{"ImageName":"a","ImageVersion":"1","BuildMetadata":{"BuildTime":"","BuildTool":"t","BuildToolVersion":"","OperatingSystem":"","KernelVersion":""},"DockerInfo":null,"CustomMetadata":null}`)},
		rawSection{SectionRamdisk, []byte("first")},
		rawSection{SectionRamdisk, []byte("second")},
		rawSection{SectionRamdisk, []byte("third")},
	)
}

// pcr computes a register from its definition.
func pcr(parts ...string) []byte {
	inner := sha512.Sum384([]byte(strings.Join(parts, "")))
	outer := sha512.Sum384(append(make([]byte, 48), inner[:]...))
	return outer[:]
}

func read(t testing.TB, b []byte) *Reader {
	t.Helper()
	r, err := NewReader(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func contents(t testing.TB, s Section) string {
	t.Helper()
	b, err := io.ReadAll(s.Open())
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestReader(t *testing.T) {
	r := read(t, valid())
	if r.Arch != X86_64 || r.Memory != DefaultMemory || r.CPUs != DefaultCPUs {
		t.Errorf("header: got %s, %d bytes, %d CPUs", r.Arch, r.Memory, r.CPUs)
	}
	if got := contents(t, r.Kernel()); got != "kernel" {
		t.Errorf("kernel = %q", got)
	}
	if got, err := r.Cmdline(); got != "reboot=k" || err != nil {
		t.Errorf("Cmdline() = %q, %v", got, err)
	}
	var ramdisks []string
	for _, s := range r.Ramdisks() {
		ramdisks = append(ramdisks, contents(t, s))
	}
	if diff := cmp.Diff([]string{"first", "second", "third"}, ramdisks); diff != "" {
		t.Errorf("ramdisks (-want +got):\n%s", diff)
	}
	if m, err := r.Metadata(); err != nil || m.ImageName != "a" || m.BuildMetadata.BuildTool != "t" {
		t.Errorf("Metadata() = %+v, %v", m, err)
	}
	if len(r.Sections()) != 6 {
		t.Errorf("got %d sections, want 6", len(r.Sections()))
	}
}

func TestMeasure(t *testing.T) {
	tests := map[string]struct {
		ramdisks []string
		want     Measurements
	}{
		"no ramdisk": {
			want: Measurements{PCR0: pcr("k", "c"), PCR1: pcr("k", "c"), PCR2: pcr()},
		},
		"one ramdisk: PCR0 is PCR1": {
			ramdisks: []string{"one"},
			want:     Measurements{PCR0: pcr("k", "c", "one"), PCR1: pcr("k", "c", "one"), PCR2: pcr()},
		},
		"three ramdisks": {
			ramdisks: []string{"one", "two", "three"},
			want:     Measurements{PCR0: pcr("k", "c", "one", "two", "three"), PCR1: pcr("k", "c", "one"), PCR2: pcr("two", "three")},
		},
		"an empty first ramdisk": {
			ramdisks: []string{"", "two"},
			want:     Measurements{PCR0: pcr("k", "c", "two"), PCR1: pcr("k", "c"), PCR2: pcr("two")},
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			img := Image{Arch: X86_64, Kernel: strings.NewReader("k"), Cmdline: "c"}
			sections := []rawSection{{SectionKernel, []byte("k")}, {SectionCmdline, []byte("c")}}
			for _, r := range tc.ramdisks {
				img.Ramdisks = append(img.Ramdisks, strings.NewReader(r))
				sections = append(sections, rawSection{SectionRamdisk, []byte(r)})
			}
			got, err := read(t, assemble(sections...)).Measure()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(&tc.want, got); diff != "" {
				t.Errorf("Measure (-want +got):\n%s", diff)
			}
			var f memFile
			written, err := Write(&f, img)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(&tc.want, written); diff != "" {
				t.Errorf("Write (-want +got):\n%s", diff)
			}
			if !bytes.Equal(f.data, assemble(sections...)) {
				t.Error("Write makes other bytes than the test's own layout")
			}
		})
	}
}

// TestEmptyPCR2 pins the register of "no second ramdisk", which AWS's tools print.
func TestEmptyPCR2(t *testing.T) {
	const want = "21b9efbc184807662e966d34f390821309eeac6802309798826296bf3e8bec7c10edb30948c90ba67310f7b964fc500a"
	if got := hex.EncodeToString(newMeasurer().measurements().PCR2); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestMeasurementsJSON(t *testing.T) {
	tests := map[string]struct {
		m    Measurements
		want string
	}{
		"unsigned": {Measurements{PCR0: []byte{0xab}, PCR1: []byte{1}, PCR2: []byte{2}},
			`{"HashAlgorithm":"Sha384 { ... }","PCR0":"ab","PCR1":"01","PCR2":"02"}`},
		"signed": {Measurements{PCR0: []byte{0xab}, PCR1: []byte{1}, PCR2: []byte{2}, PCR8: []byte{8}},
			`{"HashAlgorithm":"Sha384 { ... }","PCR0":"ab","PCR1":"01","PCR2":"02","PCR8":"08"}`},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := json.Marshal(tc.m)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != tc.want {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
		})
	}
}

func TestReaderRefuses(t *testing.T) {
	kernel := rawSection{SectionKernel, []byte("kernel")}
	cmdline := rawSection{SectionCmdline, []byte("cmdline")}
	ramdisk := rawSection{SectionRamdisk, []byte("ramdisk")}
	const offsets, sizes = 28, 28 + 32*8
	put16 := func(at int, v uint16) func([]byte) []byte {
		return func(b []byte) []byte { binary.BigEndian.PutUint16(b[at:], v); return fixCRC(b) }
	}
	put64 := func(at int, v uint64) func([]byte) []byte {
		return func(b []byte) []byte { binary.BigEndian.PutUint64(b[at:], v); return fixCRC(b) }
	}
	plain := func(b []byte) []byte { return b }
	tests := map[string]struct {
		file   []byte
		change func([]byte) []byte
		want   string
	}{
		"empty file":           {nil, plain, "0 bytes, fewer than"},
		"cut in the header":    {valid(), func(b []byte) []byte { return b[:547] }, "fewer than the 548"},
		"magic":                {valid(), func(b []byte) []byte { b[0] = 'E'; return fixCRC(b) }, "it is no EIF"},
		"version 3":            {valid(), put16(4, 3), "version is 3"},
		"version 5":            {valid(), put16(4, 5), "version is 5"},
		"header flags":         {valid(), put16(6, 2), "unknown flags 0x0002"},
		"reserved":             {valid(), put16(24, 1), "reserved field"},
		"unused":               {valid(), func(b []byte) []byte { b[540] = 1; return fixCRC(b) }, "reserved field"},
		"no sections":          {valid(), put16(26, 0), "lists 0 sections"},
		"one section":          {valid(), put16(26, 1), "lists 1 sections"},
		"33 sections":          {valid(), put16(26, 33), "lists 33 sections"},
		"65535 sections":       {valid(), put16(26, 65535), "lists 65535 sections"},
		"fewer than listed":    {valid(), put16(26, 5), "place 6 of its table is in use"},
		"more than listed":     {valid(), put16(26, 7), "section 7 of 7: it starts at byte 0"},
		"offset in the header": {valid(), put64(offsets, 0), "starts at byte 0"},
		"overlap":              {valid(), put64(offsets+8, 548), "overlap"},
		"gap":                  {valid(), put64(offsets+8, 600), "gaps"},
		"offset wraps":         {valid(), put64(offsets+8, 1<<64-4), "starts at byte 18446744073709551612"},
		"size beyond the file": {valid(), put64(sizes, 1<<20), "do not fit into the file"},
		"size wraps":           {valid(), put64(sizes, 1<<64-1), "do not fit into the file"},
		"size 4 GiB":           {valid(), put64(sizes, 4<<30), "do not fit into the file"},
		"size differs":         {valid(), put64(sizes, 5), "says that it has 6 bytes, but the header says 5"},
		"section type 0":       {assemble(kernel, cmdline, rawSection{0, nil}), plain, "unknown type 0"},
		"section type 6":       {assemble(kernel, cmdline, rawSection{6, nil}), plain, "unknown type 6"},
		"section flags":        {valid(), func(b []byte) []byte { b[551] = 1; return fixCRC(b) }, "kernel section has unknown flags"},
		"trailing bytes":       {valid(), func(b []byte) []byte { return fixCRC(append(b, 0)) }, "1 bytes follow"},
		"unlisted section": {valid(), func(b []byte) []byte {
			return fixCRC(append(append(b, encodeSectionHeader(SectionRamdisk, 4)...), "evil"...))
		}, "16 bytes follow the last section"},
		"cut in a section":       {valid(), func(b []byte) []byte { return b[:len(b)-1] }, "do not fit into the file"},
		"no kernel":              {assemble(cmdline, ramdisk), plain, "no kernel section"},
		"two kernels":            {assemble(kernel, kernel, cmdline), plain, "2 kernel sections"},
		"no cmdline":             {assemble(kernel, ramdisk), plain, "no cmdline section"},
		"cmdline before kernel":  {assemble(cmdline, kernel, ramdisk), plain, "kernel section stands behind a cmdline section"},
		"ramdisk before cmdline": {assemble(kernel, ramdisk, cmdline), plain, "cmdline section stands behind a ramdisk section"},
		"two cmdlines":           {assemble(kernel, cmdline, cmdline), plain, "2 cmdline sections"},
		"two metadata":           {assemble(kernel, cmdline, rawSection{SectionMetadata, nil}, rawSection{SectionMetadata, nil}), plain, "2 metadata sections"},
		"two signatures":         {assemble(kernel, cmdline, rawSection{SectionSignature, nil}, rawSection{SectionSignature, nil}), plain, "2 signature sections"},
		"empty kernel":           {assemble(rawSection{SectionKernel, nil}, cmdline), plain, "kernel is empty"},
		"checksum":               {valid(), func(b []byte) []byte { b[544]++; return b }, "the file is damaged"},
		"one byte of kernel":     {valid(), func(b []byte) []byte { b[560]++; return b }, "the file is damaged"},
		"default memory":         {valid(), func(b []byte) []byte { b[15]++; return b }, "the file is damaged"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			b := tc.change(tc.file)
			_, err := NewReader(bytes.NewReader(b), int64(len(b)))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want one with %q", err, tc.want)
			}
		})
	}
}

// TestReaderLimits checks the sections that are read into memory.
func TestReaderLimits(t *testing.T) {
	b := assemble(
		rawSection{SectionKernel, []byte("kernel")},
		rawSection{SectionCmdline, make([]byte, maxCmdline+1)},
		rawSection{SectionMetadata, make([]byte, maxMetadata+1)},
		rawSection{SectionSignature, make([]byte, maxSignature+1)},
	)
	r := read(t, b)
	if _, err := r.Cmdline(); err == nil {
		t.Error("Cmdline() accepts more than its limit")
	}
	if _, err := r.Metadata(); err == nil {
		t.Error("Metadata() accepts more than its limit")
	}
	if _, err := r.Measure(); err == nil {
		t.Error("Measure() accepts a signature section above the limit")
	}
}

// TestReaderMemory feeds small files that claim huge sizes.
func TestReaderMemory(t *testing.T) {
	section := valid()
	binary.BigEndian.PutUint64(section[28+32*8:], 4<<30)
	binary.BigEndian.PutUint64(section[552:], 4<<30)
	signature := func(b ...byte) []byte {
		return assemble(rawSection{SectionKernel, []byte("kernel")}, rawSection{SectionCmdline, nil}, rawSection{SectionSignature, b})
	}
	tests := map[string][]byte{
		"section":               fixCRC(section),
		"array of signatures":   signature(0x9b, 0, 0, 0, 1, 0, 0, 0, 0),
		"array of certificate":  signature(append([]byte("\x81\xa2\x73"+fieldCertificate), 0x9a, 0xff, 0xff, 0xff, 0xff)...),
		"text key":              signature(0x81, 0xa2, 0x7a, 0xff, 0xff, 0xff, 0xff),
		"map of the first":      signature(0x81, 0xba, 0xff, 0xff, 0xff, 0xff),
		"skipped further entry": signature(0x82, 0xa0, 0x5a, 0xff, 0xff, 0xff, 0xff),
	}
	for name, b := range tests {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			r, err := NewReader(bytes.NewReader(b), int64(len(b)))
			if err == nil {
				_, err = r.Measure()
			}
			if err == nil {
				t.Fatal("accepted")
			}
			runtime.ReadMemStats(&after)
			if got := after.TotalAlloc - before.TotalAlloc; got > 1<<20 {
				t.Errorf("allocated %d bytes for a file of %d", got, len(b))
			}
		})
	}
}

// countedData counts the bytes that are read.
type countedData struct {
	*strings.Reader
	read int64
}

func (d *countedData) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.Reader.ReadAt(p, off)
	d.read += int64(n)
	return n, err
}

// TestPasses checks what makes building fast: every input is read once, and hashed no more often than
// its registers need.
func TestPasses(t *testing.T) {
	const size = 3*copyBuffer + 1
	data := func() *countedData { return &countedData{Reader: strings.NewReader(strings.Repeat("x", size))} }
	inputs := []*countedData{data(), data(), data()}
	var f memFile
	if _, err := Write(&f, Image{Arch: X86_64, Kernel: inputs[0], Ramdisks: []Data{inputs[1], inputs[2]}}); err != nil {
		t.Fatal(err)
	}
	for i, d := range inputs {
		if d.read != size {
			t.Errorf("%d bytes of input %d were read, which has %d", d.read, i, size)
		}
	}

	file := &countedData{Reader: strings.NewReader(string(f.data))}
	r, err := NewReader(file, file.Size())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Measure(); err != nil {
		t.Fatal(err)
	}
	if limit := 2*file.Size() + headerSize; file.read > limit {
		t.Errorf("%d bytes of a file of %d were read to check and measure it, more than %d", file.read, file.Size(), limit)
	}

	m := newMeasurer()
	for i, want := range []int{1, 1, 0, 1, 2, 2} {
		typ := []SectionType{SectionKernel, SectionCmdline, SectionMetadata, SectionRamdisk, SectionRamdisk, SectionRamdisk}[i]
		if got := len(m.writers(typ)); got != want {
			t.Errorf("section %d, a %s, is hashed %d times, not %d", i, typ, got, want)
		}
	}
}

func TestCombineCRC(t *testing.T) {
	b := bytes.Repeat([]byte("the quick brown fox"), 100)
	for _, at := range []int{0, 1, 7, 548, len(b) - 1, len(b)} {
		got := combineCRC(crc32.ChecksumIEEE(b[:at]), crc32.ChecksumIEEE(b[at:]), uint64(len(b)-at))
		if want := crc32.ChecksumIEEE(b); got != want {
			t.Errorf("split at %d: got %08x, want %08x", at, got, want)
		}
	}
}

// Whoever made the image from which an EIF is opened may have put a pipe there.
func TestOpenPipe(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "enclave.eif")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(pipe); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("opened a pipe: %v", err)
	}
}

// TestStreaming writes and reads a ramdisk far larger than the memory that it may take.
func TestStreaming(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "big.eif"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	source, err := os.CreateTemp(t.TempDir(), "ramdisk")
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	const size = 32 << 20
	if err := source.Truncate(size); err != nil {
		t.Fatal(err)
	}
	img := Image{Arch: AArch64, Kernel: strings.NewReader("k"), Cmdline: "c",
		Ramdisks: []Data{strings.NewReader("init"), io.NewSectionReader(source, 0, size)}}

	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	written, err := Write(f, img)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	measured, err := r.Measure()
	if err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got > 4<<20 {
		t.Errorf("allocated %d bytes for a ramdisk of %d", got, size)
	}
	if diff := cmp.Diff(written, measured); diff != "" {
		t.Errorf("Write and Measure differ (-write +measure):\n%s", diff)
	}
	if r.Arch != AArch64 {
		t.Errorf("Arch = %q, want aarch64", r.Arch)
	}
}

func TestWriteRefuses(t *testing.T) {
	good := func() Image { return Image{Arch: X86_64, Kernel: strings.NewReader("k"), Cmdline: "c"} }
	tests := map[string]struct {
		change func(*Image)
		want   string
	}{
		"no architecture": {func(i *Image) { i.Arch = "" }, "architecture"},
		"no kernel":       {func(i *Image) { i.Kernel = nil }, "kernel is missing"},
		"empty kernel":    {func(i *Image) { i.Kernel = strings.NewReader("") }, "kernel is missing"},
		"30 ramdisks":     {func(i *Image) { i.Ramdisks = make([]Data, 30) }, "at most 29 fit"},
		"NUL in cmdline":  {func(i *Image) { i.Cmdline = "a\x00b" }, "NUL"},
		"29 and a signer": {func(i *Image) {
			i.Metadata, i.Signer = &Metadata{}, testSigner(t, p256)
			for range MaxRamdisks {
				i.Ramdisks = append(i.Ramdisks, strings.NewReader("r"))
			}
		}, "33 sections with the signature"},
		"large certificate": {func(i *Image) {
			i.Signer = testSigner(t, p256)
			i.Signer.pem = append(i.Signer.pem, make([]byte, maxSignature)...)
		}, "more than 32768"},
		"long cmdline":      {func(i *Image) { i.Cmdline = strings.Repeat("x", maxCmdline+1) }, "command line has 65537 bytes"},
		"bad metadata":      {func(i *Image) { i.Metadata = &Metadata{CustomMetadata: json.RawMessage("{")} }, "CustomMetadata"},
		"double metadata":   {func(i *Image) { i.Metadata = &Metadata{DockerInfo: json.RawMessage("1 2")} }, "DockerInfo: data follows"},
		"large metadata":    {func(i *Image) { i.Metadata = &Metadata{ImageName: strings.Repeat("x", maxMetadata)} }, "metadata has"},
		"ramdisk too short": {func(i *Image) { i.Ramdisks = []Data{shortData{strings.NewReader("x")}} }, "ramdisk: unexpected EOF"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			img := good()
			tc.change(&img)
			_, err := Write(&memFile{}, img)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want one with %q", err, tc.want)
			}
		})
	}
}

// shortData ends before its size.
type shortData struct{ *strings.Reader }

func (shortData) Size() int64 { return 10 }

func TestWriteTrimsCmdline(t *testing.T) {
	var a, b memFile
	if _, err := Write(&a, Image{Arch: X86_64, Kernel: strings.NewReader("k"), Cmdline: " a b\n\t"}); err != nil {
		t.Fatal(err)
	}
	if _, err := Write(&b, Image{Arch: X86_64, Kernel: strings.NewReader("k"), Cmdline: "a b"}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a.data, b.data) {
		t.Error("white space at the ends of the command line is written")
	}
}

func TestMaxRamdisks(t *testing.T) {
	img := Image{Arch: X86_64, Kernel: strings.NewReader("k"), Cmdline: "c", Metadata: &Metadata{}}
	for range MaxRamdisks {
		img.Ramdisks = append(img.Ramdisks, strings.NewReader("r"))
	}
	var f memFile
	if _, err := Write(&f, img); err != nil {
		t.Fatal(err)
	}
	if got := len(read(t, f.data).Ramdisks()); got != 29 {
		t.Errorf("got %d ramdisks, want 29", got)
	}
}

func TestMetadataEncode(t *testing.T) {
	tests := map[string]struct {
		custom, want string
	}{
		"absent":            {"", "null"},
		"keys sorted":       {`{"b":1,"a":{"d":[],"c":{}}}`, `{"a":{"c":{},"d":[]},"b":1}`},
		"spaces":            {` [ 1 , true , null , "x" ] `, `[1,true,null,"x"]`},
		"no HTML escapes":   {`"<a&b>\u2028é\/"`, "\"<a&b>\u2028é/\""},
		"control":           {`"\u0000\b\f\n\r\t\u001f\u007f\"\\"`, `"\u0000\b\f\n\r\t\u001f` + "\x7f" + `\"\\"`},
		"integers":          {`[0,-1,9223372036854775807,18446744073709551615]`, `[0,-1,9223372036854775807,18446744073709551615]`},
		"beyond 64 bits":    {`18446744073709551616`, `1.8446744073709552e+19`},
		"fractions":         {`[1.5,1.0,-0.0,-0,1e2,0.1]`, `[1.5,1.0,-0.0,-0.0,100.0,0.1]`},
		"large":             {`[1e15,1e16,123456789012345680000.0,1.5e300]`, `[1000000000000000.0,1e+16,1.2345678901234567e+20,1.5e+300]`},
		"small":             {`[0.00001,0.000001,1.5e-7]`, `[0.00001,1e-6,1.5e-7]`},
		"a name is escaped": {`{"a\"b":1}`, `{"a\"b":1}`},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			m := Metadata{ImageName: "n", ImageVersion: "v", CustomMetadata: json.RawMessage(tc.custom),
				BuildMetadata: BuildMetadata{"2024-01-02T03:04:05+00:00", "tool", "1.0", "Linux", "6.1"}}
			got, err := m.encode()
			if err != nil {
				t.Fatal(err)
			}
			want := `{"ImageName":"n","ImageVersion":"v","BuildMetadata":{"BuildTime":"2024-01-02T03:04:05+00:00","BuildTool":"tool",` +
				`"BuildToolVersion":"1.0","OperatingSystem":"Linux","KernelVersion":"6.1"},"DockerInfo":null,"CustomMetadata":` + tc.want + `}`
			if got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		})
	}
}

// TestVectors compares with what AWS's library built from the same inputs: the registers, the bytes of
// unsigned files, and those of signed ones but for the signature, of which all fields are the same.
func TestVectors(t *testing.T) {
	vector(t, "two_ramdisks.eif") // or skip
	files, err := filepath.Glob(filepath.Join(vectors, "*.eif"))
	if err != nil || len(files) < 3 {
		t.Fatalf("%d vectors found, %v", len(files), err)
	}
	for _, name := range files {
		name = strings.TrimSuffix(filepath.Base(name), ".eif")
		t.Run(name, func(t *testing.T) {
			file := vector(t, name+".eif")
			r := read(t, file)
			metadata, err := r.Metadata()
			if err != nil {
				t.Fatal(err)
			}
			if name == "metadata" { // the builder got the file, not its sorted form
				metadata.CustomMetadata = vector(t, "inputs/metadata.json")
			}
			img := Image{
				Arch:     X86_64,
				Kernel:   bytes.NewReader(vector(t, "inputs/bzImage")),
				Cmdline:  string(vector(t, "inputs/cmdline.txt")) + "\n",
				Metadata: metadata,
				Ramdisks: []Data{bytes.NewReader(vector(t, "inputs/rd1.cpio.gz")), bytes.NewReader(vector(t, "inputs/rd2.cpio.gz"))},
			}
			if curve, signed := strings.CutPrefix(name, "signed_"); signed {
				if img.Signer, err = NewSigner(vector(t, "inputs/cert_"+curve+".pem"), vector(t, "inputs/key_"+curve+".pem")); err != nil {
					t.Fatal(err)
				}
			}
			var want registers
			if err := json.Unmarshal(vector(t, name+".pcrs.json"), &want); err != nil {
				t.Fatal(err)
			}
			compareAWS(t, file, want, img)
		})
	}
}

// compareAWS compares an EIF of AWS's builder, and the registers that it printed, with what we make of
// the same inputs.
func compareAWS(t *testing.T, aws []byte, want registers, img Image) {
	t.Helper()
	r := read(t, aws)
	measured, err := r.Measure()
	if err != nil {
		t.Fatal(err)
	}
	var f memFile
	written, err := Write(&f, img)
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range map[string]*Measurements{"Measure": measured, "Write": written} {
		got := registers{hex.EncodeToString(m.PCR0), hex.EncodeToString(m.PCR1),
			hex.EncodeToString(m.PCR2), hex.EncodeToString(m.PCR8)}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: registers (-AWS +ours):\n%s", name, diff)
		}
	}
	if img.Signer == nil {
		if !bytes.Equal(f.data, aws) {
			t.Errorf("Write makes %d bytes that differ from AWS's %d", len(f.data), len(aws))
		}
		return
	}

	ours := read(t, f.data)
	for name, r := range map[string]*Reader{"AWS's": r, "ours": ours} {
		if _, _, err := r.Verify(img.Signer.Certificate(), img.Signer.Certificate().NotAfter); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	a, o := signatureFields(t, r), signatureFields(t, ours)
	if bytes.Equal(a.Signature, o.Signature) {
		t.Error("two signatures are the same: one of them is not random")
	}
	if len(a.Signature) != len(o.Signature) {
		t.Errorf("the signatures have %d (AWS) and %d bytes", len(a.Signature), len(o.Signature))
	}
	a.Signature, o.Signature = nil, nil
	if diff := cmp.Diff(a, o); diff != "" {
		t.Errorf("signature (-AWS +ours):\n%s", diff)
	}
	// Without their signatures the files are the same: header, order, metadata.
	var bare, ourBare memFile
	for f, r := range map[*memFile]*Reader{&bare: r, &ourBare: ours} {
		if _, err := r.layout().write(f, nil); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(bare.data, ourBare.data) {
		t.Error("the files differ beside their signatures")
	}
	if last := r.sections[len(r.sections)-1].Type; last != SectionSignature || len(r.sections) != len(ours.sections) {
		t.Errorf("AWS's file has %d sections, ours %d; AWS's last is a %s", len(r.sections), len(ours.sections), last)
	}
}

func FuzzReader(f *testing.F) {
	f.Add(valid())
	f.Add(assemble(rawSection{SectionKernel, []byte("k")}, rawSection{SectionCmdline, nil}))
	goldens, err := filepath.Glob("testdata/aws/*.eif")
	if err != nil || len(goldens) == 0 {
		f.Fatalf("no goldens, %v", err)
	}
	for _, name := range goldens {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= headerSize {
			fixCRC(b) // or hardly any input would pass
		}
		r, err := NewReader(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		total := int64(headerSize)
		for _, s := range r.Sections() {
			total += sectionHeaderSize + s.Size
			contents(t, s)
		}
		if total != int64(len(b)) {
			t.Errorf("%d bytes are listed, but the file has %d", total, len(b))
		}
		if r.find(SectionSignature) == nil {
			var again memFile
			if _, err := r.layout().write(&again, nil); err != nil || !bytes.Equal(again.data, b) {
				t.Errorf("written again it is another file, %v", err)
			}
		}
		r.Cmdline()
		r.Metadata()
		if m, err := r.Measure(); err == nil && (len(m.PCR0) != 48 || len(m.PCR1) != 48 || len(m.PCR2) != 48) {
			t.Errorf("registers of wrong length: %+v", m)
		}
	})
}

func FuzzMetadata(f *testing.F) {
	f.Add([]byte(contents(f, *read(f, valid()).find(SectionMetadata))))
	f.Add([]byte(`{"ImageName":"\u0000\ud800","DockerInfo":[1e5,-0,{"b":1,"a":[]}],"CustomMetadata":{"":18446744073709551616}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		decode := func(b []byte) (*Metadata, error) {
			return read(t, assemble(rawSection{SectionKernel, []byte("k")}, rawSection{SectionCmdline, nil}, rawSection{SectionMetadata, b})).Metadata()
		}
		m, err := decode(b)
		if err != nil {
			return
		}
		first, err := m.encode()
		if err != nil {
			return // a number that no float64 holds
		}
		again, err := decode([]byte(first))
		if err != nil {
			t.Fatalf("%s is not read again: %v", first, err)
		}
		m.DockerInfo, m.CustomMetadata = again.DockerInfo, again.CustomMetadata // in another form
		if diff := cmp.Diff(m, again); diff != "" {
			t.Errorf("it is read as something else (-before +after):\n%s", diff)
		}
		// Numbers may be others after another round, for which see parseFloat.
		if _, err := again.encode(); err != nil {
			t.Errorf("%s is not written again: %v", first, err)
		}
	})
}

// TestWays: the digest is the same whichever way is tried or taken.
func TestWays(t *testing.T) {
	d, want := newDigest(), sha512.New384()
	for i := range 2 * trials {
		p := bytes.Repeat([]byte{byte(i)}, copyBuffer-i%2)
		d.Write(p)
		want.Write(p)
	}
	if !bytes.Equal(d.Sum(nil), want.Sum(nil)) || d.tried != trials {
		t.Errorf("after %d trials the digest is another", d.tried)
	}
	for way, write := range ways {
		h := sha512.New384()
		if n, err := write(h, []byte("abc")); n != 3 || err != nil {
			t.Errorf("way %d: %d, %v", way, n, err)
		}
		if sum := sha512.Sum384([]byte("abc")); !bytes.Equal(h.Sum(nil), sum[:]) {
			t.Errorf("way %d gives another digest", way)
		}
	}
}
