package plugin

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"cloister.dev/cloister/enclaved/supervise/process"
	"cloister.dev/cloister/workload"
)

const (
	// A plugin that has ended is started again after firstWait, doubling to lastWait, and beginning anew
	// once it has lived for steady.
	firstWait = time.Second
	lastWait  = 30 * time.Second
	steady    = time.Minute

	// Health is asked every startEvery until the plugin has answered and every healthEvery then. One that
	// gives no answer for startPatience, and then for patience, is killed.
	startEvery    = 100 * time.Millisecond
	startPatience = 30 * time.Second
	healthEvery   = time.Second
	patience      = 5 * time.Second

	// grace is how long a plugin may take to end when it is asked to.
	grace = 2 * time.Second

	// maxLine bounds a line of a plugin's output in a log, in bytes; maxWords one in a sentence.
	maxLine  = 8 << 10
	maxWords = 300
)

// instance is one plugin, through all the processes of its life.
type instance struct {
	manifest *workload.Plugin
	headers  []string // that it may set, lower case
	spec     *process.Spec
	self     string
	children *process.Children
	socket   string // as enclaved sees it

	// conn leads to the plugin while it serves; nil when it is down.
	conn    atomic.Pointer[grpc.ClientConn]
	failing atomic.Bool

	served chan struct{} // closed when it has served once
	once   sync.Once

	mu    sync.Mutex
	words string // its last line of output
	end   string // why its last process ended
}

// run keeps the plugin alive until ctx ends.
func (p *instance) run(ctx context.Context) {
	wait := firstWait
	for {
		began := time.Now()
		err := p.live(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > steady {
			wait = firstWait
		}
		slog.Error("a plugin has ended and is started again", "plugin", p.manifest.Name, "error", err, "after", wait.String())
		p.mu.Lock()
		p.end = err.Error()
		p.mu.Unlock()
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		wait = min(2*wait, lastWait)
	}
}

// why says in a sentence why the plugin does not serve.
func (p *instance) why() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	why := "the plugin does not serve yet"
	if p.end != "" {
		why = p.end
	}
	if p.words != "" {
		why += "; its last line of output: " + p.words
	}
	return why
}

// live is the life of one process. It returns why it ended.
func (p *instance) live(ctx context.Context) error {
	if err := os.Remove(p.socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	proc, err := process.Start(p.self, p.children, p.spec, w, w)
	w.Close()
	if err != nil {
		r.Close()
		return fmt.Errorf("start the plugin: %w", err)
	}
	var output sync.WaitGroup
	output.Go(func() { p.forward(r) })
	defer output.Wait()
	defer proc.Close()

	conn, err := grpc.NewClient("passthrough:plugin",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dialSocket(ctx, p.socket) }),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: startEvery, Multiplier: 2, MaxDelay: healthEvery},
			MinConnectTimeout: time.Second,
		}),
		grpc.WithIdleTimeout(0), grpc.WithNoProxy(), grpc.WithDisableServiceConfig())
	if err != nil {
		proc.Kill()
		proc.Wait()
		return err
	}
	defer conn.Close()

	exited := make(chan error, 1)
	go func() {
		code, err := proc.Wait()
		if err == nil {
			err = fmt.Errorf("the plugin's process ended with status %d", code)
		}
		exited <- err
	}()
	err = p.watch(ctx, conn, exited)
	p.conn.Store(nil)
	if ctx.Err() != nil {
		proc.Stop()
		select {
		case <-exited:
			return ctx.Err()
		case <-time.After(grace):
		}
	}
	if errors.Is(err, errSilent) || ctx.Err() != nil {
		proc.Kill()
		<-exited
	}
	return err
}

// errSilent is why a process is killed.
var errSilent = errors.New("the plugin gave no answer to health checks (grpc.health.v1) and was killed")

// watch asks for the plugin's health until its process has ended, ctx ends, or it must be killed.
func (p *instance) watch(ctx context.Context, conn *grpc.ClientConn, exited <-chan error) error {
	health := healthv1.NewHealthClient(conn)
	every, heard, left := startEvery, time.Now(), startPatience
	for {
		ask, cancel := context.WithTimeout(ctx, healthEvery)
		res, err := health.Check(ask, &healthv1.HealthCheckRequest{})
		cancel()
		if err == nil {
			every, heard, left = healthEvery, time.Now(), patience
		}
		if res.GetStatus() == healthv1.HealthCheckResponse_SERVING {
			if p.conn.Swap(conn) == nil {
				slog.Info("a plugin serves", "plugin", p.manifest.Name)
			}
			p.once.Do(func() { close(p.served) })
		} else if err == nil {
			every = startEvery // it says itself that it will serve later
			p.conn.Store(nil)
		}
		select {
		case err := <-exited:
			return err
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(every):
		}
		if time.Since(heard) > left {
			return errSilent
		}
	}
}

// dialSocket connects to a socket in a directory that is the plugin's. A link there could lead to any
// other socket of the enclave, so none is followed.
func dialSocket(ctx context.Context, path string) (net.Conn, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open the plugin's socket: %w", err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return nil, errors.New("what lies at the plugin's path is not a socket")
	}
	var d net.Dialer
	return d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d", fd))
}

// forward logs the plugin's output line by line, longer ones in pieces, until all that could write are
// gone.
func (p *instance) forward(r *os.File) {
	defer r.Close()
	b := bufio.NewReaderSize(r, maxLine)
	for {
		line, _, err := b.ReadLine()
		if err != nil {
			if err != io.EOF {
				slog.Error("read a plugin's output", "plugin", p.manifest.Name, "error", err)
			}
			return
		}
		text := strings.ToValidUTF8(string(line), "")
		if strings.TrimSpace(text) == "" {
			continue
		}
		slog.Info("plugin output", "plugin", p.manifest.Name, "line", text)
		p.mu.Lock()
		p.words = text[:min(len(text), maxWords)]
		p.mu.Unlock()
	}
}
