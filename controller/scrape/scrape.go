// Package scrape asks the sidecars of all confidential pods for their enclaves' state and counters, every
// five seconds, as metrics-server asks kubelets. What they answer is the host's word: good enough to scale
// and to report by, and nothing that a client may trust.
package scrape

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/internal/podmetrics"
)

const (
	// Period is the time from one round to the next.
	Period = 5 * time.Second
	// MaxAge is the age at which an answer counts no more: three rounds without a new one.
	MaxAge = 3 * Period
	// window is the time over which rates are computed.
	window = 3 * Period

	timeout     = 3 * time.Second
	concurrency = 32
	// quick is far more than a sidecar takes to answer.
	quick = 500 * time.Millisecond
)

// Observation is what is known of one pod.
type Observation struct {
	Pod *corev1.Pod
	// Snapshot is the newest answer, nil if there is none that is younger than MaxAge.
	Snapshot *podmetrics.Snapshot
	// At is when Snapshot was answered.
	At time.Time
	// Requests is the rate of requests in 1/s over Window, which is zero before there are two answers of
	// one enclave.
	Requests float64
	Window   time.Duration
}

// sample is one answer.
type sample struct {
	at       time.Time
	snapshot podmetrics.Snapshot
}

// Scraper keeps the answers of all pods. It works on every replica of the controller.
type Scraper struct {
	pods  client.Reader
	fetch func(context.Context, *corev1.Pod) (podmetrics.Snapshot, error)
	log   *slog.Logger

	scrapes *prometheus.CounterVec

	mu      sync.Mutex
	samples map[types.UID][]sample // oldest first
	slow    map[types.UID]bool     // gave no answer within quick, the last time
	rounds  int
	round   chan struct{} // closed and replaced after every round
}

// New returns a scraper of the pods in a cache.
func New(pods client.Reader, log *slog.Logger, reg prometheus.Registerer) *Scraper {
	s := &Scraper{
		pods: pods, fetch: fetch, log: log, samples: map[types.UID][]sample{}, slow: map[types.UID]bool{}, round: make(chan struct{}),
		scrapes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cloister_controller_scrapes_total",
			Help: "Questions to sidecars, by result: ok or failed.",
		}, []string{"result"}),
	}
	reg.MustRegister(s.scrapes)
	return s
}

// Start works until ctx ends. It implements manager.Runnable.
func (s *Scraper) Start(ctx context.Context) error {
	tick := time.NewTicker(Period)
	defer tick.Stop()
	for {
		if err := s.scrape(ctx); err != nil && ctx.Err() == nil {
			s.log.Error("scrape sidecars", "error", err.Error())
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (*Scraper) NeedLeaderElection() bool { return false }

// Round returns a channel that is closed after the round that runs or comes next.
func (s *Scraper) Round() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.round
}

// Warm returns nil once there have been two rounds, so that rates are known.
func (s *Scraper) Warm() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rounds < 2 {
		return fmt.Errorf("%d of the first two rounds are done", s.rounds)
	}
	return nil
}

// scrape is one round. Pods that gave no quick answer the last time come after the others, as many as there
// is time for until the next round: whoever may create pods can make many that keep us waiting, and those
// must not make the answers of all others old.
func (s *Scraper) scrape(ctx context.Context) error {
	began := time.Now()
	pods, err := s.list(ctx)
	if err != nil {
		return err
	}
	alive := map[types.UID]bool{}
	var first, slow []*corev1.Pod
	s.mu.Lock()
	for _, pod := range pods {
		alive[pod.UID] = true
		switch {
		case !Serving(pod):
		case s.slow[pod.UID]:
			slow = append(slow, pod)
		default:
			first = append(first, pod)
		}
	}
	s.mu.Unlock()
	s.ask(ctx, first)
	rand.Shuffle(len(slow), func(i, j int) { slow[i], slow[j] = slow[j], slow[i] })
	late, cancel := context.WithTimeout(ctx, max(Period-time.Since(began), timeout))
	defer cancel()
	s.ask(late, slow)

	s.mu.Lock()
	defer s.mu.Unlock()
	for uid := range s.samples {
		if !alive[uid] {
			delete(s.samples, uid)
		}
	}
	for uid := range s.slow {
		if !alive[uid] {
			delete(s.slow, uid)
		}
	}
	s.rounds++
	close(s.round)
	s.round = make(chan struct{})
	return nil
}

// ask asks pods, a few at a time, until ctx ends.
func (s *Scraper) ask(ctx context.Context, pods []*corev1.Pod) {
	var group errgroup.Group
	group.SetLimit(concurrency)
	for _, pod := range pods {
		group.Go(func() error {
			if ctx.Err() != nil {
				return nil
			}
			asked := time.Now()
			snapshot, err := s.fetch(ctx, pod)
			if err == nil {
				s.scrapes.WithLabelValues("ok").Inc()
				s.add(pod.UID, sample{time.Now(), snapshot})
			} else {
				s.scrapes.WithLabelValues("failed").Inc()
				s.log.Debug("scrape sidecar", "namespace", pod.Namespace, "pod", pod.Name, "error", err.Error())
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			if err != nil || time.Since(asked) > quick {
				s.slow[pod.UID] = true
			} else {
				delete(s.slow, pod.UID)
			}
			return nil
		})
	}
	group.Wait()
}

func (s *Scraper) list(ctx context.Context, opts ...client.ListOption) ([]*corev1.Pod, error) {
	var list corev1.PodList
	if err := s.pods.List(ctx, &list, opts...); err != nil {
		return nil, fmt.Errorf("list pods: %w", err)
	}
	var out []*corev1.Pod
	for i := range list.Items {
		if Confidential(&list.Items[i]) {
			out = append(out, &list.Items[i])
		}
	}
	return out, nil
}

// add forgets what is older than the window or of an earlier enclave.
func (s *Scraper) add(uid types.UID, next sample) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var kept []sample
	for _, old := range s.samples[uid] {
		// A counter that shrinks is another enclave's too: initboot begins with generation 1 again when
		// it was restarted.
		same := old.snapshot.Generation == next.snapshot.Generation &&
			old.snapshot.Stats.GetRequestsTotal() <= next.snapshot.Stats.GetRequestsTotal()
		// Half a period of tolerance, so that the number of samples does not depend on jitter.
		if same && next.at.Sub(old.at) < window+Period/2 {
			kept = append(kept, old)
		}
	}
	s.samples[uid] = append(kept, next)
}

// Observe returns what is known of the pods that match.
func (s *Scraper) Observe(ctx context.Context, opts ...client.ListOption) ([]Observation, error) {
	pods, err := s.list(ctx, opts...)
	if err != nil {
		return nil, err
	}
	out := make([]Observation, 0, len(pods))
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, pod := range pods {
		out = append(out, observe(pod, s.samples[pod.UID], now))
	}
	return out, nil
}

func observe(pod *corev1.Pod, samples []sample, now time.Time) Observation {
	o := Observation{Pod: pod}
	if len(samples) == 0 {
		return o
	}
	last := samples[len(samples)-1]
	if now.Sub(last.at) >= MaxAge {
		return o
	}
	o.Snapshot, o.At = &last.snapshot, last.at
	for _, first := range samples[:len(samples)-1] {
		if first.snapshot.Stats != nil && last.snapshot.Stats != nil {
			o.Window = last.at.Sub(first.at)
			o.Requests = float64(requests(last)-requests(first)) / o.Window.Seconds()
			break
		}
	}
	return o
}

func requests(s sample) uint64 { return (*channel.StatsResponse).GetRequestsTotal(s.snapshot.Stats) }

// plain does not keep connections: a pod is asked rarely, and pods are many.
var plain = &http.Client{
	Timeout:       timeout,
	Transport:     &http.Transport{DisableKeepAlives: true},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

// fetch asks the sidecar of a pod.
func fetch(ctx context.Context, pod *corev1.Pod) (podmetrics.Snapshot, error) {
	return get(ctx, "http://"+net.JoinHostPort(pod.Status.PodIP, strconv.Itoa(podenv.SidecarPort))+podmetrics.Path)
}

func get(ctx context.Context, url string) (podmetrics.Snapshot, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return podmetrics.Snapshot{}, err
	}
	res, err := plain.Do(r)
	if err != nil {
		return podmetrics.Snapshot{}, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		io.CopyN(io.Discard, res.Body, 1<<10)
		return podmetrics.Snapshot{}, fmt.Errorf("the sidecar answers %s", res.Status)
	}
	return podmetrics.Parse(res.Body)
}
