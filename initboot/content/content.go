package content

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sync/singleflight"

	"cloister.dev/cloister/internal/registry"
)

const (
	// maxManifest is the largest index or manifest in bytes; registries refuse larger ones (OCI
	// distribution specification, "Pushing Manifests").
	maxManifest = 4 << 20
	// stallTimeout is how long a download may bring nothing.
	stallTimeout = 30 * time.Second
)

// Server serves images by digest, each from the repository that it is known to lie in. It is an http.Handler.
type Server struct {
	registries registry.Client
	secrets    pullSecrets
	repository name.Repository
	memory     int64
	cache      cache
	log        *slog.Logger
	mux        *http.ServeMux

	// ctx is that of downloads, which several requests may share and none owns.
	ctx       context.Context
	close     context.CancelFunc
	downloads singleflight.Group

	mu    sync.Mutex
	sizes map[v1.Hash]int64 // of the blobs that manifests name, in bytes
	// places are the repositories of what does not lie in the workload's.
	places map[v1.Hash]name.Repository
}

// New returns a server of the repository of image, a reference with a digest, and of the images more,
// which may lie elsewhere, both reached by way of registries, and where they match with the credentials in
// the folder secrets, laid out as podenv.PullSecretsDir. Dir is the cache's folder, memory the size of the enclave in bytes. The caller must Close the server.
func New(image string, more []string, registries registry.Client, secrets, dir string, memory int64, log *slog.Logger) (*Server, error) {
	ref, err := registries.ParseDigest(image)
	if err != nil {
		return nil, err
	}
	s := &Server{
		registries: registries,
		secrets:    pullSecrets(secrets),
		repository: ref.Context(),
		memory:     memory,
		cache:      cache{dir},
		log:        log,
		mux:        http.NewServeMux(),
		sizes:      map[v1.Hash]int64{},
		places:     map[v1.Hash]name.Repository{},
	}
	for _, image := range more {
		ref, err := registries.ParseDigest(image)
		if err != nil {
			return nil, err
		}
		digest, err := v1.NewHash(ref.DigestStr())
		if err != nil {
			return nil, err
		}
		s.places[digest] = ref.Context()
	}
	s.cache.clean()
	s.ctx, s.close = context.WithCancel(context.Background())
	s.mux.HandleFunc("GET /manifests/{digest}", s.handle(s.manifest))
	s.mux.HandleFunc("GET /blobs/{digest}", s.handle(s.blob))
	return s, nil
}

// Close ends the downloads that are under way.
func (s *Server) Close() { s.close() }

func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// notFound is an error for which the answer is 404.
type notFound struct{ error }

// handle answers with what get opens: its media type, its size in bytes and its content.
func (s *Server) handle(get func(v1.Hash) (mediaType string, size int64, content io.ReadCloser, err error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		digest, err := v1.NewHash(r.PathValue("digest"))
		if err == nil && digest.Algorithm != "sha256" {
			err = fmt.Errorf("unsupported digest algorithm %q", digest.Algorithm)
		}
		if err != nil {
			http.Error(w, fmt.Sprintf("%q is not a digest: %v", r.PathValue("digest"), err), http.StatusBadRequest)
			return
		}
		mediaType, size, content, err := get(digest)
		if err != nil {
			code := http.StatusBadGateway
			if errors.As(err, new(notFound)) {
				code = http.StatusNotFound
			}
			http.Error(w, err.Error(), code) // the enclave reports it as progress of the run
			return
		}
		defer content.Close()
		w.Header().Set("Content-Type", mediaType)
		w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
		io.Copy(w, content) // an error is the enclave's own end
	}
}

// manifest opens an index or a manifest, and remembers which blobs it names.
func (s *Server) manifest(digest v1.Hash) (string, int64, io.ReadCloser, error) {
	raw, err := s.manifestBytes(digest)
	if err != nil {
		return "", 0, nil, err
	}
	var m struct {
		MediaType string          `json:"mediaType"`
		Manifests []v1.Descriptor `json:"manifests"`
		Config    *v1.Descriptor  `json:"config"`
		Layers    []v1.Descriptor `json:"layers"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return "", 0, nil, fmt.Errorf("the manifest %s of %s is not JSON: %w", digest, s.place(digest), err)
	}
	if m.MediaType == "" { // optional in OCI manifests
		m.MediaType = string(types.OCIManifestSchema1)
		if m.Manifests != nil {
			m.MediaType = string(types.OCIImageIndex)
		}
	}
	if err := s.remember(m.Config, m.Layers); err != nil {
		return "", 0, nil, err
	}
	named := append(m.Manifests, m.Layers...)
	if m.Config != nil {
		named = append(named, *m.Config)
	}
	s.follow(digest, named)
	return m.MediaType, int64(len(raw)), io.NopCloser(bytes.NewReader(raw)), nil
}

// remember notes the blobs of a manifest, unless they cannot fit into the enclave even compressed.
func (s *Server) remember(config *v1.Descriptor, layers []v1.Descriptor) error {
	var total int64
	for _, l := range layers {
		if l.Size < 0 || l.Size > s.memory || total+l.Size > s.memory {
			total = 0
			for _, l := range layers { // again, for the message
				total += max(l.Size, 0)
			}
			return fmt.Errorf("the compressed layers of the image have %d bytes, more than the enclave's memory of %d bytes: give the container more memory", total, s.memory)
		}
		total += l.Size
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range layers {
		s.sizes[l.Digest] = l.Size
	}
	if config != nil && config.Size >= 0 && config.Size <= maxManifest {
		s.sizes[config.Digest] = config.Size
	}
	return nil
}

// place returns the repository of digest.
func (s *Server) place(digest v1.Hash) name.Repository {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r, ok := s.places[digest]; ok {
		return r
	}
	return s.repository
}

// follow notes that what a manifest names lies where the manifest does.
func (s *Server) follow(digest v1.Hash, named []v1.Descriptor) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if place, ok := s.places[digest]; ok {
		for _, d := range named {
			s.places[d.Digest] = place
		}
	}
}

func (s *Server) manifestBytes(digest v1.Hash) ([]byte, error) {
	f, err := s.file(digest, maxManifest, func(ctx context.Context) (io.ReadCloser, error) {
		// The digest is checked on the way into the cache, as for every file.
		return s.authorized(ctx, digest, func(ref name.Digest, options []remote.Option) (io.ReadCloser, error) {
			d, err := remote.Get(ref, options...)
			if err != nil {
				return nil, err
			}
			return io.NopCloser(bytes.NewReader(d.Manifest)), nil
		})
	})
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

// blob opens a config or a layer.
func (s *Server) blob(digest v1.Hash) (string, int64, io.ReadCloser, error) {
	s.mu.Lock()
	size, ok := s.sizes[digest]
	s.mu.Unlock()
	if !ok {
		return "", 0, nil, notFound{fmt.Errorf("no manifest that was asked for names the blob %s", digest)}
	}
	f, err := s.file(digest, size, func(ctx context.Context) (io.ReadCloser, error) {
		return s.authorized(ctx, digest, func(ref name.Digest, options []remote.Option) (io.ReadCloser, error) {
			l, err := remote.Layer(ref, options...)
			if err != nil {
				return nil, err
			}
			return l.Compressed()
		})
	})
	if err != nil {
		return "", 0, nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return "", 0, nil, err
	}
	return "application/octet-stream", info.Size(), f, nil
}

// authorized calls get with the credentials for a digest's repository, one after the other as the kubelet
// does, until one opens it; without any where there are none.
func (s *Server) authorized(ctx context.Context, digest v1.Hash, get func(name.Digest, []remote.Option) (io.ReadCloser, error)) (io.ReadCloser, error) {
	repo := s.place(digest)
	keys, err := s.secrets.lookup(repo)
	if err != nil {
		return nil, err
	}
	if len(keys) == 0 {
		keys = []authn.Authenticator{authn.Anonymous}
	}
	var body io.ReadCloser
	for _, key := range keys {
		body, err = get(repo.Digest(digest.String()), []remote.Option{
			remote.WithContext(ctx), remote.WithUserAgent("cloister"), remote.WithTransport(s.registries.RoundTripper()), remote.WithAuth(key),
		})
		if err == nil || ctx.Err() != nil {
			break
		}
	}
	return body, err
}

// file opens the cached file of digest, and fetches it first when the cache does not have it, once for
// all requests at the same time.
func (s *Server) file(digest v1.Hash, limit int64, fetch func(context.Context) (io.ReadCloser, error)) (*os.File, error) {
	if f, err := s.cache.open(digest); err == nil {
		return f, nil
	} else if !errors.Is(err, os.ErrNotExist) {
		s.log.Warn("read image cache", "digest", digest.String(), "error", err)
	}
	_, err, _ := s.downloads.Do(digest.String(), func() (any, error) {
		return nil, s.download(digest, limit, fetch)
	})
	if err != nil {
		return nil, err
	}
	f, err := s.cache.open(digest)
	if err != nil {
		return nil, fmt.Errorf("read image cache: %w", err)
	}
	return f, nil
}

// download fetches into the cache.
func (s *Server) download(digest v1.Hash, limit int64, fetch func(context.Context) (io.ReadCloser, error)) error {
	ctx, cancel := context.WithCancelCause(s.ctx)
	defer cancel(nil)
	stalled := time.AfterFunc(stallTimeout, func() {
		cancel(fmt.Errorf("the registry sent nothing for %s", stallTimeout))
	})
	defer stalled.Stop()

	begin := time.Now()
	body, err := fetch(ctx)
	if err != nil {
		return s.explain(ctx, digest, err)
	}
	defer body.Close()
	read := readerFunc(func(b []byte) (int, error) {
		n, err := body.Read(b)
		stalled.Reset(stallTimeout)
		return n, err
	})
	n, err := s.cache.write(digest, limit, read)
	if err != nil {
		return s.explain(ctx, digest, err)
	}
	s.log.Info("fetched", "digest", digest.String(), "bytes", n, "duration", time.Since(begin).String())
	return nil
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// explain makes a sentence of why digest could not be fetched.
func (s *Server) explain(ctx context.Context, digest v1.Hash, err error) error {
	what := s.place(digest).Digest(digest.String()).String()
	var t *transport.Error
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("cannot fetch %s: %w", what, context.Cause(ctx))
	case errors.As(err, &t) && t.StatusCode == http.StatusNotFound:
		return notFound{fmt.Errorf("%s is not found in its registry: check the image's name and digest", what)}
	case errors.As(err, &t) && (t.StatusCode == http.StatusUnauthorized || t.StatusCode == http.StatusForbidden):
		if keys, _ := s.secrets.lookup(s.place(digest)); len(keys) > 0 {
			return fmt.Errorf("the registry refuses %s with the credentials that the pod's imagePullSecrets have for it: correct them", what)
		}
		return fmt.Errorf("the registry refuses %s without credentials, and the pod's imagePullSecrets have none for it: add a Secret of the type kubernetes.io/dockerconfigjson", what)
	}
	return fmt.Errorf("cannot fetch %s: %w", what, err)
}
