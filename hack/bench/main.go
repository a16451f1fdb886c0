// Command bench compares the cost of one admission: ours, and that of injectors by others, in one process on
// the same pod. It is a module of its own, so that nothing of theirs enters ours.
//
// Measured is the CPU time of the whole process (getrusage), garbage collection included, in rounds that take
// turns, so that whatever else the machine does hits all alike; printed are medians.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"os"
	"runtime"
	"time"

	"github.com/dapr/dapr/pkg/injector/patcher"
	"github.com/hashicorp/go-hclog"
	agentinject "github.com/hashicorp/vault-k8s/agent-inject"
	"github.com/prometheus/client_golang/prometheus"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"

	"cloister.dev/cloister/hack/bench/cpu"
	"cloister.dev/cloister/webhook/admit"
	"cloister.dev/cloister/webhook/inject"
)

const (
	rounds = 15
	calls  = 1000 // in a round
)

// contender is what is measured: one admission, from the body of the review to the body of the answer.
type contender struct {
	name   string
	review []byte
	handle http.HandlerFunc
	// times are CPU times of a call, allocs allocations of a call, one for each round.
	times  []time.Duration
	allocs []uint64
}

func main() {
	log.SetFlags(0)
	if len(os.Args) != 2 {
		log.Fatal("usage: bench FILE, an AdmissionReview of a pod with one annotation cloister.dev/enclave")
	}
	review, err := os.ReadFile(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	with := func(old, annotations string) []byte {
		out := bytes.Replace(review, []byte(old), []byte(annotations), 1)
		if bytes.Equal(out, review) {
			log.Fatalf("%s: it has no %s", os.Args[1], old)
		}
		return out
	}
	const enclave = `"cloister.dev/enclave":"orders"`
	quiet := slog.New(slog.NewJSONHandler(io.Discard, nil))
	ours := admit.New(inject.Options{
		Driver: inject.DriverProcess, InitbootImage: "cloister.dev/initboot:1", SidecarImage: "cloister.dev/sidecar:1",
	}, nil, nil, quiet, prometheus.NewRegistry()).HTTP()
	vault := &agentinject.Handler{
		RequireAnnotation: true, VaultAddress: "https://vault.vault.svc:8200", VaultAuthType: "kubernetes", VaultAuthPath: "auth/kubernetes",
		ImageVault: "hashicorp/vault:1.18.1", Log: hclog.New(&hclog.LoggerOptions{Output: io.Discard, Level: hclog.Info}),
		UserID: "100", GroupID: "1000", SetSecurityContext: true, DefaultTemplate: "map",
		ResourceRequestCPU: "250m", ResourceRequestMem: "64Mi", ResourceLimitCPU: "500m", ResourceLimitMem: "128Mi",
	}
	contenders := []*contender{
		{name: "Cloister", review: review, handle: ours.ServeHTTP},
		{name: "Cloister, a pod that is none of ours", review: with(enclave, `"example.org/team":"fulfilment"`), handle: ours.ServeHTTP},
		{name: "vault-k8s v1.6.2", handle: vault.Handle, review: with(enclave,
			`"vault.hashicorp.com/agent-inject":"true","vault.hashicorp.com/role":"orders","vault.hashicorp.com/agent-inject-secret-db":"secret/data/orders/db"`)},
		{name: "Dapr v1.14.4, its patch alone", handle: dapr, review: with(enclave,
			`"dapr.io/enabled":"true","dapr.io/app-id":"orders","dapr.io/app-port":"8080"`)},
	}
	for _, c := range contenders {
		if err := check(c); err != nil {
			log.Fatalf("%s: %v", c.name, err)
		}
	}
	for range rounds {
		for _, c := range contenders {
			c.round()
		}
	}
	reference := contenders[2]
	fmt.Println("| one admission | CPU, µs | allocations | CPU, of that of vault-k8s |")
	fmt.Println("|---|---|---|---|")
	for _, c := range contenders {
		ratios := make([]float64, rounds)
		for i := range ratios {
			ratios[i] = float64(c.times[i]) / float64(reference.times[i])
		}
		fmt.Printf("| %s | %.0f | %d | %.2f |\n", c.name, float64(cpu.Median(c.times))/float64(time.Microsecond), cpu.Median(c.allocs), cpu.Median(ratios))
	}
}

// check sends the review once and sees that what should be patched is.
func check(c *contender) error {
	w := &answer{header: http.Header{}}
	c.handle(w, request(c.review))
	var review admissionv1.AdmissionReview
	if err := json.Unmarshal(w.body.Bytes(), &review); err != nil {
		return fmt.Errorf("decode answer %q: %w", w.body.Bytes(), err)
	}
	if r := review.Response; !r.Allowed || (len(r.Patch) == 0) != bytes.Contains(c.review, []byte("example.org/team")) {
		return fmt.Errorf("allowed %v, a patch of %d bytes, %v", r.Allowed, len(r.Patch), r.Result)
	}
	return nil
}

func (c *contender) round() {
	w := &answer{header: http.Header{}}
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start := cpu.Time()
	for range calls {
		w.body.Reset()
		c.handle(w, request(c.review))
	}
	spent := cpu.Time() - start
	runtime.ReadMemStats(&after)
	c.times = append(c.times, spent/calls)
	c.allocs = append(c.allocs, (after.Mallocs-before.Mallocs)/calls)
}

var header = http.Header{"Content-Type": {"application/json"}}

func request(body []byte) *http.Request {
	return &http.Request{Method: http.MethodPost, Header: header, Body: io.NopCloser(bytes.NewReader(body)), ContentLength: int64(len(body))}
}

// answer is a response that is kept in memory.
type answer struct {
	header http.Header
	body   bytes.Buffer
}

func (a *answer) Header() http.Header         { return a.header }
func (a *answer) WriteHeader(int)             {}
func (a *answer) Write(b []byte) (int, error) { return a.body.Write(b) }

// dapr is what Dapr's injector does with a review, without its look-ups in the cluster, its log and its
// metrics (pkg/injector/service/handler.go and pod_patch.go).
func dapr(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		log.Fatal(err)
	}
	var review admissionv1.AdmissionReview
	if err := json.Unmarshal(body, &review); err != nil {
		log.Fatal(err)
	}
	pod := &corev1.Pod{}
	if err := json.Unmarshal(review.Request.Object.Raw, pod); err != nil {
		log.Fatal(err)
	}
	sidecar := patcher.NewSidecarConfig(pod)
	sidecar.Namespace, sidecar.Identity = "orders", "orders:orders"
	sidecar.SidecarImage, sidecar.OperatorAddress, sidecar.SentryAddress = "daprio/daprd:1.14.4", "dapr-api:443", "dapr-sentry:443"
	sidecar.MTLSEnabled = true
	sidecar.SetFromPodAnnotations()
	ops, err := sidecar.GetPatch()
	if err != nil {
		log.Fatal(err)
	}
	patch, err := json.Marshal(ops)
	if err != nil {
		log.Fatal(err)
	}
	patchType := admissionv1.PatchTypeJSONPatch
	answer := admissionv1.AdmissionReview{TypeMeta: review.TypeMeta, Response: &admissionv1.AdmissionResponse{
		UID: review.Request.UID, Allowed: true, Patch: patch, PatchType: &patchType,
	}}
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		log.Fatal(err)
	}
}
