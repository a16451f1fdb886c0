package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	awsconfig "github.com/aws/aws-sdk-go-v2/config"

	"cloister.dev/cloister/internal/amazontrust"
	"cloister.dev/cloister/sidecar/relay"
)

// credentialsTimeout bounds one answer: the enclave asks again.
const credentialsTimeout = 20 * time.Second

// awsCredentials returns the pod's AWS credentials as the SDK finds them (environment, IRSA, EKS Pod
// Identity, the node's role), and renews them before they end.
func awsCredentials(ctx context.Context, region string) (aws.CredentialsProvider, error) {
	// Our image has no root certificates. AWS_CA_BUNDLE adds others, as ever.
	client := awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) {
		t.TLSClientConfig.RootCAs = amazontrust.Roots()
	})
	config, err := awsconfig.LoadDefaultConfig(ctx, awsconfig.WithDefaultRegion(region), awsconfig.WithHTTPClient(client))
	if err != nil {
		return nil, fmt.Errorf("find the pod's AWS credentials: %w", err)
	}
	return config.Credentials, nil
}

// serveCredentials makes the enclave's way to the pod's credentials, until stop.
func (s *sidecar) serveCredentials(ctx context.Context, c config, failed chan<- error) (stop func(), err error) {
	provider, err := awsCredentials(ctx, c.awsRegion)
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(c.dir, "credentials.sock")
	l, err := listenUnix(socket)
	if err != nil {
		return nil, err
	}
	server := &http.Server{Handler: credentialsHandler(provider), ReadHeaderTimeout: 5 * time.Second}
	go func() { failed <- server.Serve(l) }()
	s.credentials = relay.NewEgress(socket)
	return func() {
		s.credentials.Close()
		server.Close()
	}, nil
}

// credentialsHandler answers as the container credentials endpoint of the AWS SDKs does (SDKs reference
// guide, "Container credential provider"). Only the enclave can ask: it proves its secret.
func credentialsHandler(provider aws.CredentialsProvider) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		ctx, cancel := context.WithTimeout(r.Context(), credentialsTimeout)
		defer cancel()
		c, err := provider.Retrieve(ctx)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			json.NewEncoder(w).Encode(map[string]string{
				"code":    "NoCredentials",
				"message": fmt.Sprintf("the pod has no AWS credentials, give it some by IRSA, EKS Pod Identity or AWS_ACCESS_KEY_ID: %v", err),
			})
			return
		}
		answer := map[string]any{"AccessKeyId": c.AccessKeyID, "SecretAccessKey": c.SecretAccessKey, "Token": c.SessionToken}
		if c.CanExpire {
			answer["Expiration"] = c.Expires.UTC().Format(time.RFC3339)
		}
		json.NewEncoder(w).Encode(answer)
	})
}
