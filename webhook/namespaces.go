package main

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"cloister.dev/cloister/webhook/inject"
)

// namespaces knows the labels of the namespaces with injection. An admission review does not carry them, and
// to ask for each pod would cost more than the decision. What it does not know yet, or no more, is answered
// by Pod Security itself, after us.
type namespaces struct {
	store      cache.Store
	controller cache.Controller
}

// watchNamespaces returns what knows nothing before run.
func watchNamespaces(config *rest.Config) (*namespaces, error) {
	client, err := metadata.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("make client of metadata: %w", err)
	}
	return newNamespaces(client), nil
}

func newNamespaces(client metadata.Interface) *namespaces {
	resource := client.Resource(corev1.SchemeGroupVersion.WithResource("namespaces"))
	const selector = "cloister.dev/injection=enabled"
	n := &namespaces{}
	n.store, n.controller = cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
				options.LabelSelector = selector
				return resource.List(ctx, options)
			},
			WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
				options.LabelSelector = selector
				return resource.Watch(ctx, options)
			},
		}, client),
		ObjectType: &metav1.PartialObjectMetadata{},
		Handler:    cache.ResourceEventHandlerFuncs{},
	})
	return n
}

// run follows the namespaces until ctx ends.
func (n *namespaces) run(ctx context.Context, log *slog.Logger) {
	n.controller.RunWithContext(logr.NewContext(ctx, logr.FromSlogHandler(log.Handler())))
}

// enforced returns the level that a namespace's label has Pod Security enforce, or "".
func (n *namespaces) enforced(namespace string) string {
	object, ok, err := n.store.GetByKey(namespace)
	if err != nil || !ok {
		return ""
	}
	return object.(*metav1.PartialObjectMetadata).Labels[inject.EnforceLabel]
}
