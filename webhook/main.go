// Command webhook turns annotated pods into confidential pods when they are admitted to the cluster.
//
// It serves admission reviews on port 9443 (TLS) and /metrics, /healthz and /readyz on port 8080. It is
// configured by flags, whose defaults come from the environment: DRIVER, INITBOOT_IMAGE, SIDECAR_IMAGE,
// REVISION, POD_NAMESPACE, PLAIN_HTTP_REGISTRIES; with driver nitro HUGEPAGES, ENCLAVE_CPUS, DEVICE_GROUP.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	admissionregv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"cloister.dev/cloister/internal/certs"
	"cloister.dev/cloister/internal/registry"
	"cloister.dev/cloister/webhook/admit"
	"cloister.dev/cloister/webhook/inject"
	"cloister.dev/cloister/webhook/resolve"
)

// Names in manifests/webhook; those of a revision end with a dash and its name.
const (
	service       = "cloister-webhook"
	secret        = "cloister-webhook-ca"
	configuration = "00-cloister"
	admitPath     = "/inject"
)

const (
	admitPort = "9443"
	// selfPath is where a replica asks itself. What is asked there is in no metric, log or Event.
	selfPath = "/self"
	// drainTime is how long a replica goes on after SIGTERM and sends its clients elsewhere. With the preStop
	// sleep before it and what Shutdown may take after it, it stays within the pod's grace period.
	drainTime = 5 * time.Second
)

// setup is what the flags say.
type setup struct {
	inject.Options
	namespace string
	revision  string // empty for the default one
}

// named is the name of one of the webhook's objects.
func (s setup) named(name string) string {
	if s.revision == "" {
		return name
	}
	return name + "-" + s.revision
}

func main() {
	handler := slog.NewJSONHandler(os.Stderr, nil)
	log := slog.New(handler)
	ctrllog.SetLogger(logr.FromSlogHandler(handler))
	setup, err := configure(os.Args[1:], os.Getenv)
	if err != nil {
		log.Error("the webhook cannot start", "error", err.Error())
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := run(ctx, log, setup); err != nil {
		log.Error("the webhook ended", "error", err.Error())
		os.Exit(1)
	}
}

// configure reads the flags.
func configure(args []string, env func(string) string) (s setup, err error) {
	flags := flag.NewFlagSet("webhook", flag.ContinueOnError)
	flags.StringVar(&s.Driver, "driver", env("DRIVER"), "how enclaves are launched: process or nitro")
	flags.StringVar(&s.HugePages, "hugepages", cmp.Or(env("HUGEPAGES"), "2Mi"), "size of the pages that nodes keep for enclaves, 2Mi or 1Gi (driver nitro)")
	cpus := flags.String("enclave-cpus", env("ENCLAVE_CPUS"), "true if the device plugin offers aws.ec2.nitro/nitro_enclaves_cpus (driver nitro)")
	group := flags.String("device-group", env("DEVICE_GROUP"), "gid that may open /dev/nitro_enclaves, if there is one (driver nitro)")
	flags.StringVar(&s.InitbootImage, "initboot-image", env("INITBOOT_IMAGE"), "image of initboot and of the console")
	flags.StringVar(&s.SidecarImage, "sidecar-image", env("SIDECAR_IMAGE"), "image of the sidecar")
	flags.StringVar(&s.revision, "revision", env("REVISION"), "revision of this webhook; empty for the default one")
	flags.StringVar(&s.namespace, "namespace", env("POD_NAMESPACE"), "namespace of the webhook")
	plain := flags.String("plain-http-registries", env("PLAIN_HTTP_REGISTRIES"), "registries, HOST or HOST:PORT with commas between, that may be reached without TLS")
	if err := flags.Parse(args); err != nil {
		return s, err
	}
	s.PlainHTTP = registry.ParseList(*plain)
	if err := s.Read(*cpus, *group); err != nil {
		return s, err
	}
	for name, value := range map[string]string{"INITBOOT_IMAGE": s.InitbootImage, "SIDECAR_IMAGE": s.SidecarImage, "POD_NAMESPACE": s.namespace} {
		if value == "" {
			return s, fmt.Errorf("%s is empty: set it, as manifests/base does", name)
		}
	}
	return s, nil
}

// run serves until ctx ends, sends clients elsewhere for a while, and then lets running requests finish.
func run(ctx context.Context, log *slog.Logger, setup setup) error {
	config, err := rest.InClusterConfig()
	if err != nil {
		return fmt.Errorf("configure client: %w", err)
	}
	scheme := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(scheme), admissionregv1.AddToScheme(scheme)); err != nil {
		return fmt.Errorf("build scheme: %w", err)
	}
	kube, err := client.New(config, client.Options{Scheme: scheme})
	if err != nil {
		return fmt.Errorf("make client: %w", err)
	}
	namespaces, err := watchNamespaces(config)
	if err != nil {
		return err
	}
	source := &certs.Source{
		Client: kube, Namespace: setup.namespace, Secret: setup.named(secret), Service: setup.named(service),
		Target: certs.MutatingWebhook(setup.named(configuration)), Log: log, Now: time.Now,
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "certificate_expiry_timestamp_seconds",
			Help: "When the serving certificate expires, in seconds since 1970; 0 when there is none.",
		}, func() float64 {
			if t := source.NotAfter(); !t.IsZero() {
				return float64(t.Unix())
			}
			return 0
		}),
	)

	events := admit.NewEvents(kube, log, reg)
	resolver := resolve.New(setup.PlainHTTP, log)
	handler := admit.New(setup.Options, resolver.Resolve, events, log, reg)
	handler.Enforced = namespaces.enforced
	self := admit.New(setup.Options, nil, nil, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	check := &selfCheck{source: source, url: "https://127.0.0.1:" + admitPort + selfPath}
	var draining atomic.Bool
	admission := server(leaving(&draining, admitMux(handler, self)))
	plain := server(plainMux(check, &draining, reg))
	tlsListener, err := tls.Listen("tcp", ":"+admitPort, tlsConfig(source))
	if err != nil {
		return fmt.Errorf("listen for admission reviews: %w", err)
	}
	plainListener, err := net.Listen("tcp", ":8080")
	if err != nil {
		return fmt.Errorf("listen for metrics and probes: %w", err)
	}

	failed := make(chan error, 2)
	go func() { failed <- admission.Serve(tlsListener) }()
	go func() { failed <- plain.Serve(plainListener) }()
	go source.Run(ctx)
	go events.Run(ctx)
	go namespaces.run(ctx, log)
	log.Info("webhook started", "driver", setup.Driver, "initboot", setup.InitbootImage, "sidecar", setup.SidecarImage, "revision", setup.revision)

	select {
	case err := <-failed:
		return fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
	}
	// The preStop sleep of the pod is over, so no new connection should come here any more. API servers keep theirs:
	// one that were closed under a request would refuse a pod.
	draining.Store(true)
	select {
	case err := <-failed:
		return fmt.Errorf("serve: %w", err)
	case <-time.After(drainTime):
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	return errors.Join(admission.Shutdown(last), plain.Shutdown(last))
}

// leaving makes each answer the last of its connection once draining is set.
func leaving(draining *atomic.Bool, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if draining.Load() {
			w.Header().Set("Connection", "close")
		}
		next.ServeHTTP(w, r)
	})
}

func admitMux(h, self *admit.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("POST "+admitPath, h.HTTP())
	mux.Handle("POST "+selfPath, self.HTTP())
	return mux
}

func plainMux(check *selfCheck, draining *atomic.Bool, reg *prometheus.Registry) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		err := check.ready(r.Context())
		if draining.Load() {
			err = errors.New("the webhook is ending")
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}

// tlsConfig offers HTTP/1.1 only: API servers keep their connections, and HTTP/2 brings them nothing here.
func tlsConfig(source *certs.Source) *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		NextProtos:     []string{"http/1.1"},
		GetCertificate: source.GetCertificate,
	}
}

func server(handler http.Handler) *http.Server {
	return &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       5 * time.Minute,
	}
}
