package plugin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"cloister.dev/cloister/enclaved/host"
	"cloister.dev/cloister/enclaved/image"
	"cloister.dev/cloister/enclaved/supervise/process"
	"cloister.dev/cloister/workload"
)

const (
	// firstUID is the uid and gid of the first plugin, beyond those of 16 bits that images use. An image's
	// own user is not asked.
	firstUID = 1 << 16

	// rootDir, relative to Config.Dir and a plugin's name, is a plugin's root and runDir the directory that
	// it shares with enclaved.
	rootDir = "root"
	runDir  = "run"

	// runTarget is where a plugin finds runDir. Its own socket and that of its proxy lie there.
	runTarget   = "/run/cloister"
	socketName  = "plugin.sock"
	proxySocket = "proxy.sock"

	// program is where a built-in plugin finds this program.
	program = "/enclaved"

	// tmpSize bounds a plugin's /tmp, in bytes. Its root is read-only.
	tmpSize = 64 << 20
)

// Config is what plugins are started with.
type Config struct {
	Manifest *workload.Manifest
	// Dir is an existing directory for their roots.
	Dir string
	// Self is the path of this program.
	Self     string
	Children *process.Children
	// Image fetches an image and unpacks it into root, an existing empty directory.
	Image func(ctx context.Context, want workload.Image, root string, progress func(step, failure string)) (*image.Config, error)
	// Dial is the way out, for those plugins that have one.
	Dial Dial
	// Progress tells a step, with a sentence where it has not worked yet.
	Progress func(step, failure string)
}

// Set is the running plugins of a manifest.
type Set struct {
	plugins []*instance
	cancel  context.CancelFunc
	running sync.WaitGroup
	proxies []net.Listener
}

// Start starts the authentication plugins of a manifest and returns when all that are required have
// served. It returns nil when there are none. When ctx ends first, its cause is the error; the
// life of the plugins ends with Close alone.
func Start(ctx context.Context, cfg Config) (*Set, error) {
	s := &Set{}
	var life context.Context
	life, s.cancel = context.WithCancel(context.Background())
	for i := range cfg.Manifest.Plugins {
		m := &cfg.Manifest.Plugins[i]
		if m.Type != workload.PluginAuthentication {
			continue
		}
		p, err := s.prepare(ctx, life, cfg, m, firstUID+i)
		if err != nil {
			s.Close()
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			return nil, fmt.Errorf("plugin %s: %w", m.Name, err)
		}
		s.plugins = append(s.plugins, p)
	}
	if len(s.plugins) == 0 {
		s.cancel()
		return nil, nil
	}
	for _, p := range s.plugins {
		s.running.Go(func() { p.run(life) })
	}
	for _, p := range s.plugins {
		if err := p.wait(ctx, cfg.Progress); err != nil {
			s.Close()
			return nil, err
		}
	}
	return s, nil
}

// Headers are the headers that the plugins may set on a request, lower case.
func (s *Set) Headers() []string {
	var out []string
	for _, p := range s.plugins {
		out = append(out, p.headers...)
	}
	return out
}

// Close asks the plugins to end, kills those that do not, and returns when all are gone.
func (s *Set) Close() {
	s.cancel()
	for _, l := range s.proxies {
		l.Close()
	}
	s.running.Wait()
}

// prepare makes what a plugin's process finds around it.
func (s *Set) prepare(ctx, life context.Context, cfg Config, m *workload.Plugin, uid int) (*instance, error) {
	dir := filepath.Join(cfg.Dir, m.Name)
	root, run := filepath.Join(dir, rootDir), filepath.Join(dir, runDir)
	for _, d := range []string{root, run} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(os.Chmod(run, 0o700), os.Chown(run, uid, uid)); err != nil {
		return nil, err
	}
	spec, err := specOf(ctx, cfg, m, root, uid)
	if err != nil {
		return nil, err
	}
	spec.NoNetwork = true
	spec.Binds = append(spec.Binds, process.Bind{Source: run, Target: runTarget})
	// Not through NewSpec, which expands $(NAME) in the values.
	spec.Env = append(spec.Env,
		EnvSocket+"="+filepath.Join(runTarget, socketName),
		EnvConfig+"="+cmp.Or(string(m.Config), "{}"))
	if endpoints := m.Endpoints(); len(endpoints) > 0 {
		path := filepath.Join(run, proxySocket)
		l, err := net.Listen("unix", path)
		if err != nil {
			return nil, fmt.Errorf("listen for its connections: %w", err)
		}
		s.proxies = append(s.proxies, l)
		if err := errors.Join(os.Chmod(path, 0o600), os.Chown(path, uid, uid)); err != nil {
			return nil, err
		}
		proxy := &proxy{allowed: endpoints, dial: cfg.Dial}
		s.running.Go(func() { proxy.serve(life, l) })
		spec.Env = append(spec.Env, EnvProxy+"="+filepath.Join(runTarget, proxySocket))
	}
	return &instance{
		manifest: m, headers: m.RequestHeaders(), spec: spec, self: cfg.Self, children: cfg.Children,
		socket: filepath.Join(run, socketName), served: make(chan struct{}),
	}, nil
}

// specOf describes the process: this program as a subcommand, or what an image says.
func specOf(ctx context.Context, cfg Config, m *workload.Plugin, root string, uid int) (*process.Spec, error) {
	if m.Builtin != "" {
		return &process.Spec{
			Args: []string{program, m.Builtin}, Dir: "/", Root: root, UID: uid, GID: uid, Groups: []int{uid},
			NoNewPrivileges: true, ReadOnlyRoot: true, StopSignal: unix.SIGTERM,
			Binds: []process.Bind{{Source: cfg.Self, Target: program}},
		}, nil
	}
	config, err := cfg.Image(ctx, *m.Image, root, func(step, failure string) {
		cfg.Progress(fmt.Sprintf("plugin %s: %s", m.Name, step), failure)
	})
	if err != nil {
		return nil, err
	}
	id := int64(uid)
	return process.NewSpec(&workload.Manifest{
		User:     &workload.User{UID: &id, GID: &id, NonRoot: true},
		Security: &workload.Security{NoNewPrivileges: true, ReadOnlyRoot: true, DropCapabilities: []string{"ALL"}},
		Mounts:   []workload.Mount{{Path: "/tmp", Kind: workload.MountTmpfs, SizeLimit: tmpSize}},
	}, config, root, tmpSize, host.Env{})
}

// wait returns when the plugin has served, at once for one that is not required.
func (p *instance) wait(ctx context.Context, progress func(step, failure string)) error {
	if !p.manifest.Required {
		return nil
	}
	step := "starting plugin " + p.manifest.Name
	progress(step, "")
	said := ""
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-p.served:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
			if why := p.why(); why != said {
				said = why
				progress(step, why)
			}
		}
	}
}
