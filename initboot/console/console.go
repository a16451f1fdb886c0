package console

import (
	"context"
	"errors"
	"io"
	"math"
	"os"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/podsock"
)

const (
	// ExitLost is the exit code when the enclave was lost: what container runtimes use when they fail
	// themselves.
	ExitLost = 125
	// exitTerminated is 128 and SIGTERM, exitKilled 128 and SIGKILL.
	exitTerminated = 128 + 15
	exitKilled     = 128 + 9

	// maxMargin is what the console keeps of the grace period to report the workload's end before the
	// kubelet kills it.
	maxMargin = 2 * time.Second
	// maxMessage is what the kubelet takes of a termination message, in bytes.
	maxMessage = 4096
	// lastAnswer is how long initboot may take to say how the last probes went.
	lastAnswer = 500 * time.Millisecond
	// retry is the pause between tries to begin the run.
	retry = 500 * time.Millisecond
)

// Console runs one workload.
type Console struct {
	Pod podsock.PodClient
	// Stdout and Stderr get the workload's bytes, and nothing else.
	Stdout, Stderr io.Writer
	// Grace is the pod's grace period, ProbeGrace that of probes which have one of their own.
	Grace      time.Duration
	ProbeGrace map[channel.ProbeKind]time.Duration
	// Supplied goes with the run, and what changes of it afterwards.
	Supplied Supplied

	mu      sync.Mutex
	started time.Time // of the workload
}

// Run runs the workload and returns the exit code and the termination message. It tries for ever to begin the run, but never begins a second one. When
// stop ends it stops the workload, and returns within the grace period.
func (c *Console) Run(stop context.Context) (code int, last LastWord) {
	values, err := c.Supplied.Values()
	if err != nil {
		return ExitLost, LastWord{Message: err.Error()}
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	overdue := make(chan struct{})
	defer context.AfterFunc(stop, func() { c.stop(ctx, overdue) })()

	type result struct {
		code int
		last LastWord
	}
	ended := make(chan result, 1)
	go func() {
		for {
			exited, begun, err := c.follow(ctx, values)
			switch {
			case exited != nil:
				ended <- result{int(exited.GetCode()), LastWord{exited.GetMessage(), string(exited.GetTerminationMessage())}}
				return
			case begun:
				ended <- result{ExitLost, LastWord{Message: lost(err)}}
				return
			case stop.Err() != nil:
				ended <- result{exitTerminated, LastWord{Message: "the pod was stopped before the workload was started"}}
				return
			}
			select {
			case <-stop.Done():
			case <-ctx.Done():
				return
			case <-time.After(retry):
			}
		}
	}()
	select {
	case r := <-ended:
		return r.code, r.last
	case <-overdue:
		return exitKilled, LastWord{Message: "the workload did not end within the grace period: it is killed with its enclave"}
	}
}

// lost is the sentence for a run that broke.
func lost(err error) string {
	if errors.Is(err, io.EOF) {
		return "initboot ended the run without an exit code"
	}
	message := status.Convert(err).Message()
	if strings.HasPrefix(message, "error reading from server") { // gRPC's own, when the connection breaks
		message = "initboot was lost, and the enclave with it: " + message
	}
	return message
}

// follow asks for the run and copies its output until it ends. Begun says that the enclave may have
// started the workload.
func (c *Console) follow(ctx context.Context, values *channel.HostValues) (exited *channel.Exited, begun bool, err error) {
	stream, err := c.Pod.Run(ctx, &podsock.RunRequest{Values: values})
	if err != nil {
		return nil, false, err
	}
	for {
		ev, err := stream.Recv()
		if err != nil {
			return nil, begun, err
		}
		if !begun {
			begun = true
			c.Supplied.Follow(ctx, values, c.Pod)
			proto.Reset(values) // the enclave has them
		}
		switch ev := ev.Event.(type) {
		case *channel.RunEvent_Output:
			w := c.Stdout
			if ev.Output.GetStream() == channel.Output_STREAM_STDERR {
				w = c.Stderr
			}
			// Where nobody reads any more the workload runs on, as in any container.
			w.Write(ev.Output.GetData())
		case *channel.RunEvent_Started:
			c.mu.Lock()
			c.started = time.Now()
			c.mu.Unlock()
		case *channel.RunEvent_Exited:
			return ev.Exited, true, nil
		}
	}
}

// stop asks initboot to stop the workload within the grace period, a third of which is for clients to
// leave. It closes overdue when that was not enough.
func (c *Console) stop(ctx context.Context, overdue chan<- struct{}) {
	begin, grace := time.Now(), c.gracePeriod(ctx)
	budget := grace - min(maxMargin, grace/2)
	drain := grace / 3
	// Half of the margin is for the last output to arrive.
	late := time.AfterFunc(budget+(grace-budget)/2-time.Since(begin), func() { close(overdue) })
	context.AfterFunc(ctx, func() { late.Stop() })
	for ctx.Err() == nil {
		// A failure is one of the run too, which reports it. Once more, since the run may have reached
		// initboot after the stop.
		c.Pod.Stop(ctx, &channel.StopRequest{
			DrainMs: uint32(drain.Milliseconds()),
			GraceMs: uint32((budget - drain).Milliseconds()),
		})
		select {
		case <-ctx.Done():
		case <-time.After(retry):
		}
	}
}

// running returns for how long the workload has run.
func (c *Console) running() (time.Duration, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.started.IsZero() {
		return 0, false
	}
	return time.Since(c.started), true
}

// gracePeriod returns how long the kubelet waits. It does not say why it stops the container, and a probe
// may have a grace period of its own: one that has failed, or does not answer at once, may be why.
func (c *Console) gracePeriod(ctx context.Context) time.Duration {
	grace := c.Grace
	ctx, cancel := context.WithTimeout(ctx, lastAnswer)
	defer cancel()
	for kind, d := range c.ProbeGrace {
		if d >= grace {
			continue // a deletion may be why just as well
		}
		// The last answer, however old; without one this fails at once.
		answer, err := c.Pod.Probe(ctx, &channel.ProbeRequest{Kind: kind, MaxAgeMs: math.MaxUint32})
		if err != nil || !answer.GetOk() {
			grace = d
		}
	}
	return grace
}

// LastWord is what becomes the container's termination message.
type LastWord struct {
	// Message is a sentence of Cloister's own, where the exit code does not speak for itself.
	Message string
	// Workload is what the workload left.
	Workload string
}

// Write writes a termination message, of which the kubelet takes the last 4096 bytes. It writes nothing
// when there is nothing to say: then the kubelet may take the end of the log instead.
func (l LastWord) Write(path string) error {
	own := l.Message
	if own != "" {
		own += "\n"
	}
	if room := max(maxMessage-len(own), 0); len(l.Workload) > room {
		l.Workload = l.Workload[len(l.Workload)-room:]
	}
	if own+l.Workload == "" {
		return nil
	}
	return os.WriteFile(path, []byte(own+l.Workload), 0o644)
}
