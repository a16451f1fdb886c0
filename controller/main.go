// Command controller lets the cluster see into enclaves as far as anybody may: it serves enclave metrics to
// the HorizontalPodAutoscaler, and writes enclave state as pod conditions and Events.
//
// Every replica scrapes the sidecars and serves the custom metrics API on port 6443 (TLS); one of them, the
// leader, writes state. /metrics is on port 8080, /healthz and /readyz on port 8081. The namespace comes
// from POD_NAMESPACE.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/go-logr/logr"
	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	ctrlmetrics "sigs.k8s.io/controller-runtime/pkg/metrics"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/custom-metrics-apiserver/pkg/cmd"

	"cloister.dev/cloister/controller/metrics"
	"cloister.dev/cloister/controller/scrape"
	"cloister.dev/cloister/controller/state"
	"cloister.dev/cloister/internal/certs"
)

// Names in manifests/base.
const (
	name       = "cloister-controller"
	secret     = "cloister-controller-ca"
	apiService = "v1beta2.custom.metrics.k8s.io"
)

// apiPort is where the custom metrics API is served.
const apiPort = 6443

func main() {
	handler := slog.NewJSONHandler(os.Stderr, nil)
	log := slog.New(handler)
	ctrllog.SetLogger(logr.FromSlogHandler(handler))
	klog.SetSlogLogger(log)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := run(ctx, log, os.Getenv("POD_NAMESPACE")); err != nil {
		log.Error("the controller ended", "error", err.Error())
		os.Exit(1)
	}
}

// everywhere is a manager.Runnable that does not need to be the leader.
type everywhere func(context.Context) error

func (f everywhere) Start(ctx context.Context) error { return f(ctx) }

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (everywhere) NeedLeaderElection() bool { return false }

// run works until ctx ends.
func run(ctx context.Context, log *slog.Logger, namespace string) error {
	if namespace == "" {
		return errors.New("POD_NAMESPACE is empty: set it, as manifests/base does")
	}
	config, err := rest.InClusterConfig()
	if err != nil {
		return fmt.Errorf("configure client: %w", err)
	}
	config.QPS, config.Burst = 50, 100
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return fmt.Errorf("build scheme: %w", err)
	}
	// What is written, and the little that is read besides pods, needs no cache.
	direct, err := client.New(config, client.Options{Scheme: scheme})
	if err != nil {
		return fmt.Errorf("make client: %w", err)
	}
	mgr, err := manager.New(config, manager.Options{
		Scheme:                        scheme,
		Cache:                         cache.Options{ByObject: map[client.Object]cache.ByObject{&corev1.Pod{}: {Transform: scrape.Trim}}},
		LeaderElection:                true,
		LeaderElectionID:              name,
		LeaderElectionNamespace:       namespace,
		LeaderElectionReleaseOnCancel: true,
		Metrics:                       metricsserver.Options{BindAddress: ":8080"},
		HealthProbeBindAddress:        ":8081",
	})
	if err != nil {
		return fmt.Errorf("make manager: %w", err)
	}
	source := &certs.Source{
		Client: direct, Namespace: namespace, Secret: secret, Service: name, Target: certs.APIService(apiService), Log: log, Now: time.Now,
	}
	scraper := scrape.New(mgr.GetCache(), log, ctrlmetrics.Registry)
	writer := state.New(scraper, direct, log, ctrlmetrics.Registry)
	api, err := apiServer(source, metrics.Provider{Observe: scraper.Observe})
	if err != nil {
		return err
	}
	err = errors.Join(
		mgr.Add(everywhere(func(ctx context.Context) error { source.Run(ctx); return nil })),
		mgr.Add(scraper),
		mgr.Add(everywhere(api)),
		mgr.Add(writer),
		mgr.AddHealthzCheck("ping", func(*http.Request) error { return nil }),
		mgr.AddReadyzCheck("certificate", func(*http.Request) error { return source.Ready() }),
		mgr.AddReadyzCheck("metrics", func(*http.Request) error { return scraper.Warm() }),
	)
	if err != nil {
		return err
	}
	// Without it the first request for metrics would start the cache.
	if _, err := mgr.GetCache().GetInformer(ctx, &corev1.Pod{}); err != nil {
		return fmt.Errorf("watch pods: %w", err)
	}
	log.Info("controller started", "namespace", namespace)
	if err := mgr.Start(ctx); err != nil {
		return fmt.Errorf("run: %w", err)
	}
	return nil
}

// apiServer returns what serves the custom metrics API until its context ends, as soon as there is a
// certificate. Who asks is checked with the cluster's API server.
func apiServer(source *certs.Source, provider metrics.Provider) (func(context.Context) error, error) {
	adapter := &cmd.AdapterBase{Name: name, FlagSet: pflag.NewFlagSet(name, pflag.ContinueOnError)}
	adapter.InstallFlags()
	adapter.SecureServing.BindPort = apiPort
	adapter.SecureServing.ServerCert.CertDirectory = "" // in memory
	adapter.WithCustomMetrics(provider)
	config, err := adapter.Config()
	if err != nil {
		return nil, fmt.Errorf("configure the custom metrics API: %w", err)
	}
	config.GenericConfig.SecureServing.Cert = certificate{source}
	if _, err := adapter.Server(); err != nil {
		return nil, fmt.Errorf("make the custom metrics API: %w", err)
	}
	issued := make(chan struct{})
	source.OnIssue(sync.OnceFunc(func() { close(issued) }))
	return func(ctx context.Context) error {
		select {
		case <-issued:
			return adapter.Run(ctx)
		case <-ctx.Done():
			return nil
		}
	}, nil
}
