package content

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// cache keeps files under the SHA-256 of their content, as sha256/<hex>.
type cache struct{ dir string }

// temporary is the pattern of the names of files that are not whole yet.
const temporary = ".download-*"

func (c cache) path(digest v1.Hash) string { return filepath.Join(c.dir, digest.Algorithm, digest.Hex) }

// open returns the file of digest after it has read it whole. A file with other content is removed,
// so that it is fetched again.
func (c cache) open(digest v1.Hash) (*os.File, error) {
	f, err := os.Open(c.path(digest))
	if err != nil {
		return nil, err
	}
	h := sha256.New()
	_, err = io.Copy(h, f)
	if sum := hex.EncodeToString(h.Sum(nil)); err == nil && sum != digest.Hex {
		err = errors.Join(fmt.Errorf("the file has the digest sha256:%s and was dropped", sum), os.Remove(f.Name()))
	}
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// clean removes what downloads of a former process left.
func (c cache) clean() {
	left, _ := filepath.Glob(filepath.Join(c.dir, "sha256", temporary))
	for _, path := range left {
		os.Remove(path)
	}
}

// write stores at most limit bytes of r, which must have the digest, and returns how many there were.
// A file appears under its name only when it is whole.
func (c cache) write(digest v1.Hash, limit int64, r io.Reader) (n int64, err error) {
	path := c.path(digest)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return 0, err
	}
	f, err := os.CreateTemp(filepath.Dir(path), temporary)
	if err != nil {
		return 0, err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err == nil {
			err = os.Rename(f.Name(), path)
		}
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	h := sha256.New()
	n, err = io.Copy(io.MultiWriter(f, h), io.LimitReader(r, limit+1))
	if err != nil {
		return n, err
	}
	if n > limit {
		return n, fmt.Errorf("it has more than the %d bytes that its manifest says", limit)
	}
	if sum := hex.EncodeToString(h.Sum(nil)); sum != digest.Hex {
		return n, fmt.Errorf("the registry sent content with the digest sha256:%s", sum)
	}
	return n, nil
}
