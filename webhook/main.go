// Command webhook turns annotated pods into confidential pods when they are admitted to the cluster.
//
// It serves admission reviews on port 9443 (TLS) and /metrics, /healthz and /readyz on port 8080. It is
// configured by flags, whose defaults come from the environment: DRIVER, INITBOOT_IMAGE, SIDECAR_IMAGE,
// POD_NAMESPACE, PLAIN_HTTP_REGISTRIES.
package main

import (
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
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"cloister.dev/cloister/internal/certs"
	"cloister.dev/cloister/internal/registry"
	"cloister.dev/cloister/webhook/admit"
	"cloister.dev/cloister/webhook/inject"
	"cloister.dev/cloister/webhook/resolve"
)

// Names in manifests/base.
const (
	service       = "cloister-webhook"
	secret        = "cloister-webhook-ca"
	configuration = "00-cloister"
	admitPath     = "/inject"
)

func main() {
	handler := slog.NewJSONHandler(os.Stderr, nil)
	log := slog.New(handler)
	ctrllog.SetLogger(logr.FromSlogHandler(handler))
	options, namespace, err := configure(os.Args[1:], os.Getenv)
	if err != nil {
		log.Error("the webhook cannot start", "error", err.Error())
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := run(ctx, log, options, namespace); err != nil {
		log.Error("the webhook ended", "error", err.Error())
		os.Exit(1)
	}
}

// configure reads the flags.
func configure(args []string, env func(string) string) (options inject.Options, namespace string, err error) {
	flags := flag.NewFlagSet("webhook", flag.ContinueOnError)
	flags.StringVar(&options.Driver, "driver", env("DRIVER"), "how enclaves are launched: process")
	flags.StringVar(&options.InitbootImage, "initboot-image", env("INITBOOT_IMAGE"), "image of initboot and of the console")
	flags.StringVar(&options.SidecarImage, "sidecar-image", env("SIDECAR_IMAGE"), "image of the sidecar")
	flags.StringVar(&namespace, "namespace", env("POD_NAMESPACE"), "namespace of the webhook")
	plain := flags.String("plain-http-registries", env("PLAIN_HTTP_REGISTRIES"), "registries, HOST or HOST:PORT with commas between, that may be reached without TLS")
	if err := flags.Parse(args); err != nil {
		return options, "", err
	}
	options.PlainHTTP = registry.ParseList(*plain)
	switch options.Driver {
	case inject.DriverProcess:
	case "nitro", "qemu":
		return options, "", fmt.Errorf("driver %s is not built yet: set DRIVER to process", options.Driver)
	default:
		return options, "", fmt.Errorf("there is no driver %q: set DRIVER to process", options.Driver)
	}
	for name, value := range map[string]string{"INITBOOT_IMAGE": options.InitbootImage, "SIDECAR_IMAGE": options.SidecarImage, "POD_NAMESPACE": namespace} {
		if value == "" {
			return options, "", fmt.Errorf("%s is empty: set it, as manifests/base does", name)
		}
	}
	return options, namespace, nil
}

// run serves until ctx ends and then lets running requests finish.
func run(ctx context.Context, log *slog.Logger, options inject.Options, namespace string) error {
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
	source := &certs.Source{
		Client: kube, Namespace: namespace, Secret: secret, Service: service, Target: certs.MutatingWebhook(configuration), Log: log, Now: time.Now,
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

	admission := server(admitMux(admit.New(options, resolve.New(options.PlainHTTP, log).Resolve, log, reg)))
	plain := server(plainMux(source, reg))
	tlsListener, err := tls.Listen("tcp", ":9443", tlsConfig(source))
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
	log.Info("webhook started", "driver", options.Driver, "initboot", options.InitbootImage, "sidecar", options.SidecarImage)

	select {
	case err := <-failed:
		return fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
	}
	// The preStop sleep of the pod is over: no new connection comes here any more.
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	return errors.Join(admission.Shutdown(last), plain.Shutdown(last))
}

func admitMux(h *admit.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("POST "+admitPath, &admission.Webhook{Handler: h})
	return mux
}

func plainMux(source *certs.Source, reg *prometheus.Registry) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := source.Ready(); err != nil {
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
