package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
)

// pageSize is how many objects one request to the API server asks for.
const pageSize = 500

// kube reads from an API server. Of client-go it takes only the transport: the clients of all API groups
// would make this command much larger.
type kube struct {
	config *rest.Config
	client rest.Interface
}

// findCluster reads a kubeconfig: the file, or what KUBECONFIG or ~/.kube/config say; the context, or the current one.
func findCluster(file, contextName string) (*kube, clientcmd.ClientConfig, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = file
	kubeconfig := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: contextName})
	config, err := kubeconfig.ClientConfig()
	switch {
	case clientcmd.IsEmptyConfig(err):
		return nil, nil, errors.New("find the cluster: there is no kubeconfig: name one in KUBECONFIG")
	case err != nil:
		return nil, nil, fmt.Errorf("find the cluster: read the kubeconfig: %w", err)
	}
	k, err := connect(config)
	return k, kubeconfig, err
}

func connect(config *rest.Config) (*kube, error) {
	// Only what says why a request failed is decoded by it.
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	config = rest.CopyConfig(config)
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	config.AcceptContentTypes, config.ContentType = runtime.ContentTypeJSON, runtime.ContentTypeJSON
	config.WarningHandler = rest.NoWarnings{}
	client, err := rest.UnversionedRESTClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("connect to the cluster: %w", err)
	}
	return &kube{config, client}, nil
}

// read decodes what is at a path of the API.
func (k *kube) read(ctx context.Context, path string, params map[string]string, into any) error {
	request := k.client.Get().AbsPath(path)
	for name, value := range params {
		request.Param(name, value)
	}
	result := request.Do(ctx)
	if err := result.Error(); err != nil { // with the server's own words, which Raw lacks
		return err
	}
	body, err := result.Raw()
	if err != nil {
		return err
	}
	return json.Unmarshal(body, into)
}

// list reads all pages of a list.
func list[T any](ctx context.Context, k *kube, path string) ([]T, error) {
	var items []T
	params := map[string]string{"limit": strconv.Itoa(pageSize)}
	for {
		var page struct {
			metav1.ListMeta `json:"metadata"`
			Items           []T
		}
		if err := k.read(ctx, path, params, &page); err != nil {
			return nil, err
		}
		items = append(items, page.Items...)
		if page.Continue == "" {
			return items, nil
		}
		params["continue"] = page.Continue
	}
}

// dial connects to a port of a pod through the API server, as kubectl port-forward does. Errors of the
// connection itself show as its end.
func (k *kube) dial(namespace, pod string, port int32) (net.Conn, error) {
	url := k.client.Post().AbsPath("/api/v1/namespaces", namespace, "pods", pod, "portforward").URL()
	overWebsocket, err := portforward.NewSPDYOverWebsocketDialer(url, k.config)
	if err != nil {
		return nil, err
	}
	transport, upgrader, err := spdy.RoundTripperFor(k.config)
	if err != nil {
		return nil, err
	}
	// API servers before 1.31 do not know the first. Of two failures the second is told.
	dialer := portforward.NewFallbackDialer(overWebsocket, spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, url), func(error) bool { return true })
	connection, _, err := dialer.Dial(portforward.PortForwardProtocolV1Name)
	if err != nil {
		return nil, err
	}
	// One request is two streams (k8s.io/client-go/tools/portforward).
	headers := http.Header{}
	headers.Set(corev1.PortHeader, strconv.Itoa(int(port)))
	headers.Set(corev1.PortForwardRequestIDHeader, "0")
	headers.Set(corev1.StreamType, corev1.StreamTypeError)
	failure, err := connection.CreateStream(headers)
	if err != nil {
		connection.Close()
		return nil, err
	}
	failure.Close() // nothing is sent on it
	headers.Set(corev1.StreamType, corev1.StreamTypeData)
	data, err := connection.CreateStream(headers)
	if err != nil {
		connection.Close()
		return nil, err
	}
	ours, theirs := net.Pipe()
	go func() {
		io.Copy(theirs, data)
		theirs.Close()
	}()
	go func() {
		io.Copy(data, theirs)
		connection.Close()
	}()
	return ours, nil
}
