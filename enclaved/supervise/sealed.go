package supervise

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"cloister.dev/cloister/enclaved/image"
	"cloister.dev/cloister/internal/sealed"
	"cloister.dev/cloister/workload"
)

// Sealed is what a sealed EIF holds. It is measured with the EIF, so that the host has no say in it.
type Sealed struct {
	// Manifest is the workload manifest as it was found.
	Manifest []byte
	// Layout is the directory of the images, an OCI layout, whose files have Size bytes.
	Layout string
	Size   int64
}

// readSealed looks below root for what a sealed EIF holds; it returns nil for a base EIF. One that holds a
// part of it is an error: the host's manifest must not take the place of one that is lost.
func readSealed(root string) (*Sealed, error) {
	if _, err := os.Lstat(filepath.Join(root, sealed.Dir)); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("look for the sealed image: %w", err)
	}
	s := &Sealed{Layout: filepath.Join(root, sealed.Image)}
	var err error
	if s.Manifest, err = os.ReadFile(filepath.Join(root, sealed.Manifest)); err != nil {
		return nil, fmt.Errorf("the enclave image is incomplete, build it again with `cloister build`: %w", err)
	}
	err = filepath.WalkDir(s.Layout, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			s.Size += info.Size()
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("the enclave image is incomplete, build it again with `cloister build`: %w", err)
	}
	return s, nil
}

// manifestOf returns the workload manifest of this enclave and its bytes: the sealed one, or else the host's.
func (e *Enclave) manifestOf(host []byte) (*workload.Manifest, []byte, error) {
	if e.cfg.Sealed == nil {
		m, err := workload.Parse(host)
		return m, host, err
	}
	if len(host) > 0 {
		return nil, nil, errors.New("this enclave image is sealed: it has a workload manifest of its own and takes none from the host")
	}
	m, err := workload.Parse(e.cfg.Sealed.Manifest)
	if err != nil {
		return nil, nil, fmt.Errorf("the workload manifest in the enclave image cannot be used, build it again with `cloister build`: %w", err)
	}
	return m, e.cfg.Sealed.Manifest, nil
}

// fetcher returns where images come from: the sealed layout, or else the host's content server. Images may
// take limit bytes of memory.
func (e *Enclave) fetcher(progress func(step, failure string)) (f *image.Fetcher, limit int64) {
	if e.cfg.Sealed == nil {
		return image.NewFetcher(e.dialContent, progress), e.cfg.Memory
	}
	return image.NewLayout(e.cfg.Sealed.Layout, progress), e.cfg.Memory - e.cfg.Sealed.Size
}

// dropLayout gives the memory of the layers back when everything is unpacked.
func (e *Enclave) dropLayout() error {
	if e.cfg.Sealed == nil {
		return nil
	}
	if err := os.RemoveAll(e.cfg.Sealed.Layout); err != nil {
		return fmt.Errorf("remove the unpacked layers: %w", err)
	}
	return nil
}
