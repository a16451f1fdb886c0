package scrape

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/podmetrics"
	"cloister.dev/cloister/internal/podsock"
)

// makePod is a confidential pod as the API server has it, whose sidecar runs.
func makePod(name string) *corev1.Pod {
	running := corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "test", Name: name, UID: types.UID(name), Labels: map[string]string{"app": name},
			Annotations: map[string]string{"cloister.dev/enclave": "app", "other": "x"},
		},
		Spec: corev1.PodSpec{
			InitContainers: []corev1.Container{{Name: "cloister-initboot", Image: "i"}, {Name: "cloister-sidecar", Image: "s"}},
			Containers:     []corev1.Container{{Name: "app", Image: "a"}, {Name: "other"}},
		},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, PodIP: "10.0.0.1", HostIP: "10.0.0.2",
			Conditions:            []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
			InitContainerStatuses: []corev1.ContainerStatus{{Name: "cloister-initboot", State: running}, {Name: "cloister-sidecar", State: running, ContainerID: "c://1", Image: "s"}},
			ContainerStatuses:     []corev1.ContainerStatus{{Name: "app", State: running, ContainerID: "c://2", Image: "a"}, {Name: "other"}},
		},
	}
}

func running(generation, requests uint64) podmetrics.Snapshot {
	return podmetrics.Snapshot{
		Phase: podsock.EnclaveState_PHASE_RUNNING, Generation: generation, Attested: true,
		Stats: &channel.StatsResponse{RequestsTotal: requests, MemoryTotal: 100},
	}
}

// newScraper scrapes what answer says.
func newScraper(answer func(pod string) (podmetrics.Snapshot, error), pods ...client.Object) *Scraper {
	s := New(fake.NewClientBuilder().WithObjects(pods...).Build(), slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	s.fetch = func(_ context.Context, pod *corev1.Pod) (podmetrics.Snapshot, error) { return answer(pod.Name) }
	return s
}

// observe returns the only observation.
func (s *Scraper) only(t *testing.T) Observation {
	t.Helper()
	list, err := s.Observe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 {
		t.Fatalf("%d observations", len(list))
	}
	return list[0]
}

func TestTrim(t *testing.T) {
	pod := makePod("a")
	got, err := Trim(pod)
	if err != nil {
		t.Fatal(err)
	}
	want := makePod("a")
	delete(want.Annotations, "other")
	want.Spec = corev1.PodSpec{InitContainers: []corev1.Container{{Name: "cloister-sidecar"}}}
	want.Status.HostIP = ""
	want.Status.InitContainerStatuses = want.Status.InitContainerStatuses[1:]
	want.Status.InitContainerStatuses[0].Image = ""
	want.Status.ContainerStatuses = want.Status.ContainerStatuses[:1]
	want.Status.ContainerStatuses[0].Image = ""
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	again, err := Trim(got)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(got, again); diff != "" {
		t.Errorf("trimming twice: %s", diff)
	}

	plain := makePod("b")
	plain.Spec.InitContainers = nil
	got, err = Trim(plain)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "test", Name: "b", UID: "b"}}, got); diff != "" {
		t.Error(diff)
	}
}

// Rates are over 15 s, and never over two enclaves.
func TestRates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		answer, failure := running(1, 1000), error(nil)
		s := newScraper(func(string) (podmetrics.Snapshot, error) { return answer, failure }, makePod("a"))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); s.Start(ctx) }()
		defer func() { cancel(); <-done }()
		round := func(next podmetrics.Snapshot, err error) Observation {
			answer, failure = next, err
			time.Sleep(Period)
			synctest.Wait()
			return s.only(t)
		}
		want := func(o Observation, requests float64, window time.Duration) {
			t.Helper()
			if o.Snapshot == nil || o.Requests != requests || o.Window != window {
				t.Errorf("%v requests/s over %s, want %v over %s", o.Requests, o.Window, requests, window)
			}
		}

		synctest.Wait()
		want(s.only(t), 0, 0)
		if s.Warm() == nil {
			t.Error("warm after one round")
		}
		want(round(running(1, 1050), nil), 10, Period)
		if err := s.Warm(); err != nil {
			t.Error(err)
		}
		want(round(running(1, 1150), nil), 15, 2*Period)
		want(round(running(1, 1300), nil), 20, 3*Period)
		want(round(running(1, 1300), nil), 250./15, 3*Period)
		want(round(running(1, 1300), nil), 10, 3*Period)
		want(round(running(1, 1300), nil), 0, 3*Period)

		// Another enclave: its counter begins anew.
		want(round(running(2, 5), nil), 0, 0)
		want(round(running(2, 15), nil), 2, Period)
		// Another initboot: generation 1 again.
		want(round(running(2, 3), nil), 0, 0)

		// What is not answered counts for 15 s.
		lost := errors.New("no route to host")
		want(round(running(2, 3), nil), 0, Period)
		want(round(podmetrics.Snapshot{}, lost), 0, Period)
		want(round(podmetrics.Snapshot{}, lost), 0, Period)
		if o := round(podmetrics.Snapshot{}, lost); o.Snapshot != nil || o.Window != 0 {
			t.Errorf("an answer that is 15 s old counts: %+v", o)
		}
	})
}

func TestWhoIsAsked(t *testing.T) {
	without := makePod("without-enclave")
	without.Spec.InitContainers = nil
	booting := makePod("booting")
	booting.Status.InitContainerStatuses[1].State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{}}
	noIP := makePod("no-ip")
	noIP.Status.PodIP = ""
	notReady := makePod("not-ready")
	notReady.Status.Conditions = nil
	asked := make(chan string, 10)
	s := newScraper(func(pod string) (podmetrics.Snapshot, error) {
		asked <- pod
		return running(1, 0), nil
	}, without, booting, noIP, notReady)
	if err := s.scrape(t.Context()); err != nil {
		t.Fatal(err)
	}
	close(asked)
	var got []string
	for pod := range asked {
		got = append(got, pod)
	}
	if diff := cmp.Diff([]string{"not-ready"}, got); diff != "" {
		t.Error(diff)
	}
	list, err := s.Observe(t.Context())
	if err != nil || len(list) != 3 {
		t.Errorf("%d confidential pods are observed, want 3: %v", len(list), err)
	}
}

// No more than a few at a time, and nothing is kept of pods that are gone.
func TestManyPods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 3 * concurrency
		var pods []client.Object
		for i := range n {
			pods = append(pods, makePod("pod-"+string(rune('a'+i/26))+string(rune('a'+i%26))))
		}
		s := newScraper(func(string) (podmetrics.Snapshot, error) {
			time.Sleep(time.Second)
			return running(1, 0), nil
		}, pods...)
		begin := time.Now()
		if err := s.scrape(t.Context()); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took != 3*time.Second {
			t.Errorf("%d pods took %s", n, took)
		}
		if len(s.samples) != n {
			t.Errorf("%d of %d answers are kept", len(s.samples), n)
		}
		for _, pod := range pods {
			if err := s.pods.(client.Client).Delete(t.Context(), pod); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.scrape(t.Context()); err != nil {
			t.Fatal(err)
		}
		if len(s.samples) != 0 {
			t.Errorf("answers of %d pods that are gone", len(s.samples))
		}
	})
}

// Pods that keep the scraper waiting do not make the answers of others old, and are asked again.
func TestSlowPods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pods := []client.Object{makePod("good")}
		for i := range 10 * concurrency {
			pods = append(pods, makePod(fmt.Sprintf("bad-%03d", i)))
		}
		var waiting atomic.Bool
		waiting.Store(true)
		s := newScraper(nil, pods...)
		s.fetch = func(ctx context.Context, pod *corev1.Pod) (podmetrics.Snapshot, error) {
			if pod.Name != "good" && waiting.Load() {
				select {
				case <-time.After(timeout - time.Second):
				case <-ctx.Done():
				}
				if strings.HasSuffix(pod.Name, "0") || ctx.Err() != nil { // the others do answer
					return podmetrics.Snapshot{}, errors.New("silent")
				}
			}
			return running(1, 0), nil
		}
		round := func() time.Duration {
			began := time.Now()
			if err := s.scrape(t.Context()); err != nil {
				t.Fatal(err)
			}
			return time.Since(began)
		}
		round() // they are not known yet
		for range 3 {
			if took := round(); took > Period {
				t.Errorf("a round took %s", took)
			}
			if last := s.samples["good"]; time.Since(last[len(last)-1].at) > Period {
				t.Errorf("the answer of the good pod is %s old", time.Since(last[len(last)-1].at))
			}
		}
		waiting.Store(false)
		round()
		if len(s.slow) != 0 || len(s.samples) != len(pods) {
			t.Errorf("%d pods are slow, %d of %d have answered", len(s.slow), len(s.samples), len(pods))
		}
	})
}

func TestGet(t *testing.T) {
	for name, tt := range map[string]struct {
		handler http.HandlerFunc
		want    string // of the error
	}{
		"good":  {podmetrics.Handler(func(context.Context) podmetrics.Snapshot { return running(3, 4) }).ServeHTTP, ""},
		"error": {func(w http.ResponseWriter, r *http.Request) { http.Error(w, "no", http.StatusInternalServerError) }, "500"},
		"elsewhere": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
		}, "302"},
		"something else": {func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "<html>") }, "read metrics"},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(tt.handler)
			defer server.Close()
			s, err := get(t.Context(), server.URL+podmetrics.Path)
			if tt.want == "" {
				if err != nil || s.Generation != 3 || s.Stats.GetRequestsTotal() != 4 {
					t.Errorf("got %+v, %v", s, err)
				}
			} else if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q in it", err, tt.want)
			}
		})
	}
}
