package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"cloister.dev/cloister/internal/oci"
	"cloister.dev/cloister/workload"
)

// Retries wait from firstWait, doubling, to lastWait.
const (
	firstWait = time.Second
	lastWait  = 30 * time.Second
)

// headerTimeout bounds the wait for an answer's header. initboot fetches a whole layer before it
// answers, so it is long.
const headerTimeout = 15 * time.Minute

// Config is what an image says about how it is run.
type Config = oci.Config

// Fetcher gets an image from a content server: plain HTTP, GET /manifests/<digest> and GET
// /blobs/<digest>. The server is the host's: it can refuse and delay, and nothing else. Or it gets the
// image from a layout in the enclave's own file system. Both ways every byte is verified.
type Fetcher struct {
	client   *http.Client
	layout   string // directory; empty for a content server
	progress func(step, failure string)
	wait     func(ctx context.Context, d time.Duration) error
}

// NewFetcher returns a Fetcher that reaches the content server with dial and tells progress of each
// step, with a sentence where the last try of the step failed.
func NewFetcher(dial func(context.Context) (net.Conn, error), progress func(step, failure string)) *Fetcher {
	return &Fetcher{
		client: &http.Client{
			Transport: &http.Transport{
				DialContext:           func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
				ResponseHeaderTimeout: headerTimeout,
				DisableCompression:    true,
				MaxIdleConnsPerHost:   1,
			},
			// Everything is named by its digest: there is nowhere else to go.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		progress: progress,
		wait:     sleep,
	}
}

// NewLayout returns a Fetcher that reads the OCI layout (OCI image-spec, image-layout.md) in dir. What is
// missing or wrong there stays so: the first error is final.
func NewLayout(dir string, progress func(step, failure string)) *Fetcher {
	return &Fetcher{client: &http.Client{}, layout: dir, progress: progress}
}

// Close closes what f has open.
func (f *Fetcher) Close() { f.client.CloseIdleConnections() }

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// Image fetches want and unpacks it into root, an existing empty directory; scratch is a directory for
// one compressed layer at a time, unused with a layout. Compressed and unpacked bytes may take limit bytes
// of memory, without those of a layout. Each fetch from a content server that fails is tried again until
// ctx ends: then the error is ctx's cause. Every other error is final: the image itself cannot be used.
func (f *Fetcher) Image(ctx context.Context, want workload.Image, root, scratch string, limit int64) (*Config, error) {
	platform := want.Platform
	if platform == "" {
		platform = workload.DefaultPlatform
	}
	m, err := f.manifest(ctx, oci.Descriptor{Digest: want.Digest, Size: -1})
	if err != nil {
		return nil, err
	}
	if m.Manifests != nil {
		d, err := m.Choose(platform)
		if err != nil {
			return nil, err
		}
		if m, err = f.manifest(ctx, d); err != nil {
			return nil, err
		}
		if m.Manifests != nil {
			return nil, errors.New("the image index names another index where an image was expected")
		}
	}
	b, err := f.bytes(ctx, f.doing()+" the image's config", "/blobs/", *m.Config, oci.MaxConfig)
	if err != nil {
		return nil, err
	}
	config, err := oci.ParseConfig(b, platform, len(m.Layers))
	if err != nil {
		return nil, err
	}
	u, err := NewUnpacker(root, limit)
	if err != nil {
		return nil, err
	}
	defer u.Close()
	for i, l := range m.Layers {
		step := fmt.Sprintf("%s layer %d of %d (%d bytes)", f.doing(), i+1, len(m.Layers), l.Size)
		if need := u.Used() + f.held(l); need > limit {
			return nil, &SpaceError{Need: need, Limit: limit}
		}
		blob, err := f.layer(ctx, step, l, scratch)
		if err != nil {
			return nil, err
		}
		f.progress(fmt.Sprintf("unpacking layer %d of %d", i+1, len(m.Layers)), "")
		err = unpackVerified(ctx, u, blob, f.held(l), l, config.RootFS.DiffIDs[i])
		blob.Close()
		if err != nil {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			return nil, fmt.Errorf("layer %d of %d: %w", i+1, len(m.Layers), err)
		}
	}
	return &config.Config, nil
}

// doing says for people what takes time.
func (f *Fetcher) doing() string {
	if f.layout != "" {
		return "reading"
	}
	return "fetching"
}

// held is how much memory a layer's compressed bytes take of what an image may take, in bytes.
func (f *Fetcher) held(d oci.Descriptor) int64 {
	if f.layout != "" {
		return 0
	}
	return content(d.Size)
}

// unpackVerified unpacks a layer whose compressed bytes have been verified, and verifies the others. The
// compressed bytes take held bytes of the same memory meanwhile.
func unpackVerified(ctx context.Context, u *Unpacker, blob *os.File, held int64, d oci.Descriptor, diffID string) error {
	u.limit -= held
	defer func() { u.limit += held }()
	h := sha256.New()
	hashed := func(r io.Reader) io.Reader { return io.TeeReader(&contextReader{ctx, r}, h) }
	if err := u.layer(blob, oci.Layers[d.MediaType], hashed); err != nil {
		var space *SpaceError
		if errors.As(err, &space) { // said in whole figures
			return &SpaceError{Need: space.Need + held, Limit: space.Limit + held}
		}
		return err
	}
	if got := "sha256:" + hex.EncodeToString(h.Sum(nil)); got != diffID {
		return fmt.Errorf("unpacked it is %s, and the image's config says %s", got, diffID)
	}
	return nil
}

// contextReader ends with its context.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (r *contextReader) Read(b []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.r.Read(b)
}

// manifest fetches an index or an image manifest. Its size is not known when it is named by the
// workload manifest: then it is negative.
func (f *Fetcher) manifest(ctx context.Context, d oci.Descriptor) (*oci.Manifest, error) {
	b, err := f.bytes(ctx, f.doing()+" the image manifest", "/manifests/", d, oci.MaxManifest)
	if err != nil {
		return nil, err
	}
	return oci.ParseManifest(b)
}

// bytes fetches and verifies something small.
func (f *Fetcher) bytes(ctx context.Context, step, path string, d oci.Descriptor, limit int64) ([]byte, error) {
	var b []byte
	err := f.retry(ctx, step, func() error {
		body, err := f.get(ctx, path+d.Digest)
		if err != nil {
			return err
		}
		defer body.Close()
		if b, err = io.ReadAll(io.LimitReader(body, limit+1)); err != nil {
			return fmt.Errorf("read %s: %w", d.Digest, err)
		}
		if int64(len(b)) > limit {
			return fmt.Errorf("%s has more than %d bytes", d.Digest, limit)
		}
		sum := sha256.Sum256(b)
		return d.Verify(int64(len(b)), sum[:])
	})
	return b, err
}

// layer fetches and verifies a layer into an unnamed file; that of a layout stays where it is.
func (f *Fetcher) layer(ctx context.Context, step string, d oci.Descriptor, scratch string) (*os.File, error) {
	if f.layout != "" {
		f.progress(step, "")
		file, err := f.open(d.Digest)
		if err != nil {
			return nil, err
		}
		h := sha256.New()
		n, err := io.Copy(h, &contextReader{ctx, io.LimitReader(file, d.Size+1)})
		if err == nil {
			err = d.Verify(n, h.Sum(nil))
		}
		if err == nil {
			_, err = file.Seek(0, io.SeekStart)
		}
		if err != nil {
			file.Close()
			return nil, err
		}
		return file, nil
	}
	file, err := unnamed(scratch)
	if err != nil {
		return nil, err
	}
	err = f.retry(ctx, step, func() error {
		if _, err := file.Seek(0, io.SeekStart); err != nil {
			return err
		}
		if err := file.Truncate(0); err != nil {
			return err
		}
		body, err := f.get(ctx, "/blobs/"+d.Digest)
		if err != nil {
			return err
		}
		defer body.Close()
		h := sha256.New()
		n, err := io.Copy(io.MultiWriter(file, h), io.LimitReader(body, d.Size+1))
		if err != nil {
			return fmt.Errorf("read %s: %w", d.Digest, err)
		}
		return d.Verify(n, h.Sum(nil))
	})
	if err == nil {
		_, err = file.Seek(0, io.SeekStart)
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// unnamed makes a file that is gone when it is closed.
func unnamed(dir string) (*os.File, error) {
	file, err := os.CreateTemp(dir, "layer-")
	if err != nil {
		return nil, fmt.Errorf("make a file for a layer: %w", err)
	}
	if err := os.Remove(file.Name()); err != nil {
		file.Close()
		return nil, fmt.Errorf("make a file for a layer: %w", err)
	}
	return file, nil
}

// retry tries until it succeeds or ctx ends, and once with a layout.
func (f *Fetcher) retry(ctx context.Context, step string, try func() error) error {
	f.progress(step, "")
	for wait := firstWait; ; wait = min(2*wait, lastWait) {
		err := try()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if f.layout != "" {
			return err
		}
		f.progress(step, err.Error())
		if err := f.wait(ctx, wait); err != nil {
			return err
		}
	}
}

// maxSentence bounds the server's word on an error, in bytes.
const maxSentence = 1 << 10

// open opens what a layout has of a digest.
func (f *Fetcher) open(digest string) (*os.File, error) {
	file, err := os.Open(filepath.Join(f.layout, "blobs", strings.Replace(digest, ":", "/", 1)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the enclave image is incomplete, it lacks the blob %s: build it again with `cloister build`", digest)
	}
	return file, err
}

// get returns the body of a 200 answer, or a file of the layout.
func (f *Fetcher) get(ctx context.Context, path string) (io.ReadCloser, error) {
	if f.layout != "" {
		return f.open(filepath.Base(path))
	}
	// The host's name means nothing: the dialler leads to the content server.
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://content"+path, nil)
	if err != nil {
		return nil, err
	}
	res, err := f.client.Do(req)
	if err != nil {
		if u, ok := errors.AsType[*url.Error](err); ok {
			err = u.Err // its address says nothing to anybody outside
		}
		return nil, fmt.Errorf("ask for %s: %w", filepath.Base(path), err)
	}
	if res.StatusCode == http.StatusOK {
		return res.Body, nil
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(io.LimitReader(res.Body, maxSentence))
	sentence := strings.Join(strings.Fields(strings.ToValidUTF8(string(b), "")), " ")
	if sentence == "" {
		sentence = "no reason given"
	}
	return nil, fmt.Errorf("%s: %s (status %d)", filepath.Base(path), sentence, res.StatusCode)
}
