// Mkimage assembles a single-layer OCI image without a Dockerfile, an engine or a registry.
//
// The result depends only on the inputs: entries are sorted, times are zero, owners are 0:0 unless
// --keep-owner is given. It is written as a docker-archive (for `docker load`, `kind load image-archive`
// and `ctr images import`), pushed to a registry, or both. The digest of the manifest is printed.
//
//	mkimage -o FILE -t NAME:TAG [flags]
//	mkimage --push HOST:PORT/NAME:TAG [flags]
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// list is a flag that may be given more than once.
type list []string

func (l *list) String() string     { return strings.Join(*l, ",") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

// options are the command line.
type options struct {
	out, rootfs, user, workdir, stopSignal, entrypoint, push string
	tags, adds, dirs, envs, ports                            list
	keepOwner                                                bool
}

func main() {
	var o options
	flag.StringVar(&o.out, "o", "", "write a docker-archive to this `file`")
	flag.Var(&o.tags, "t", "`name:tag` of the image in the archive (repeatable)")
	flag.StringVar(&o.push, "push", "", "push to this `reference` of a registry; plain HTTP only on loopback addresses")
	flag.StringVar(&o.rootfs, "rootfs", "", "`directory` or tar file that the image starts with")
	flag.BoolVar(&o.keepOwner, "keep-owner", false, "keep the numeric owners of --rootfs")
	flag.Var(&o.adds, "add", "`SRC:DST[:MODE]`, a file or a folder (repeatable)")
	flag.Var(&o.dirs, "dir", "`PATH[:MODE]`, an empty folder (repeatable)")
	flag.Var(&o.envs, "env", "`K=V` (repeatable)")
	flag.Var(&o.ports, "port", "exposed TCP `port` (repeatable)")
	flag.StringVar(&o.entrypoint, "entrypoint", "", "`JSON` array of strings")
	flag.StringVar(&o.user, "user", "", "`uid[:gid]` or name")
	flag.StringVar(&o.workdir, "workdir", "/", "working `folder`")
	flag.StringVar(&o.stopSignal, "stop-signal", "", "`signal` that ends the container")
	flag.Parse()
	if err := run(o, os.Stdout); err != nil {
		slog.Error("mkimage", "error", err)
		os.Exit(1)
	}
}

// run builds the image of o, writes it where o says and prints its digest to stdout.
func run(o options, stdout io.Writer) error {
	if (o.out == "") == (o.push == "") {
		return fmt.Errorf("give exactly one of -o FILE and --push REFERENCE")
	}
	cfg, err := o.config()
	if err != nil {
		return err
	}
	layerFile, err := os.CreateTemp(os.Getenv("TMPDIR"), "mkimage-*.tar")
	if err != nil {
		return fmt.Errorf("create layer: %w", err)
	}
	defer os.Remove(layerFile.Name())
	defer layerFile.Close()
	if err := writeLayer(layerFile, o); err != nil {
		return fmt.Errorf("write layer: %w", err)
	}

	var layer v1.Layer
	if o.push != "" {
		layer, err = tarball.LayerFromFile(layerFile.Name(), tarball.WithMediaType(types.OCILayer))
	} else {
		// An archive stays on this machine: compressing it would only cost time.
		layer, err = newPlainLayer(layerFile.Name())
	}
	if err != nil {
		return fmt.Errorf("read layer: %w", err)
	}
	base := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	base = mutate.ConfigMediaType(base, types.OCIConfigJSON)
	img, err := mutate.Append(base, mutate.Addendum{Layer: layer, History: v1.History{CreatedBy: "mkimage"}})
	if err != nil {
		return fmt.Errorf("append layer: %w", err)
	}
	full, err := img.ConfigFile()
	if err != nil {
		return fmt.Errorf("read config: %w", err)
	}
	full.OS, full.Architecture, full.Config = "linux", "amd64", cfg
	if img, err = mutate.ConfigFile(img, full); err != nil {
		return fmt.Errorf("set config: %w", err)
	}
	if err := o.store(img); err != nil {
		return err
	}
	digest, err := img.Digest()
	if err != nil {
		return fmt.Errorf("compute digest: %w", err)
	}
	_, err = fmt.Fprintln(stdout, digest)
	return err
}

// config translates the flags to the image's runtime configuration.
func (o options) config() (v1.Config, error) {
	cfg := v1.Config{Env: o.envs, User: o.user, WorkingDir: o.workdir, StopSignal: o.stopSignal}
	if len(cfg.Env) == 0 {
		cfg.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	}
	if o.entrypoint != "" {
		if err := json.Unmarshal([]byte(o.entrypoint), &cfg.Entrypoint); err != nil {
			return cfg, fmt.Errorf("parse --entrypoint: %w", err)
		}
	}
	for _, p := range o.ports {
		if cfg.ExposedPorts == nil {
			cfg.ExposedPorts = map[string]struct{}{}
		}
		cfg.ExposedPorts[p+"/tcp"] = struct{}{}
	}
	return cfg, nil
}

// store writes img to the archive or pushes it.
func (o options) store(img v1.Image) error {
	if o.push != "" {
		ref, err := name.ParseReference(o.push)
		if err != nil {
			return fmt.Errorf("parse --push: %w", err)
		}
		if err := remote.Write(ref, img); err != nil {
			return fmt.Errorf("push %s: %w", ref, err)
		}
		return nil
	}
	images := map[name.Tag]v1.Image{}
	for _, t := range o.tags {
		tag, err := name.NewTag(t)
		if err != nil {
			return fmt.Errorf("parse -t: %w", err)
		}
		images[tag] = img
	}
	if len(images) == 0 {
		return fmt.Errorf("an archive needs at least one -t NAME:TAG")
	}
	if err := tarball.MultiWriteToFile(o.out, images); err != nil {
		return fmt.Errorf("write %s: %w", o.out, err)
	}
	return nil
}
