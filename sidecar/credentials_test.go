package main

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials/endpointcreds"

	"cloister.dev/cloister/internal/vsock"
)

// alone takes all that the SDK could find on this machine away, but for what env says.
func alone(t *testing.T, env map[string]string) {
	t.Helper()
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); strings.HasPrefix(name, "AWS_") {
			t.Setenv(name, "") // restored at the end
			os.Unsetenv(name)
		}
	}
	none := filepath.Join(t.TempDir(), "none")
	t.Setenv("AWS_CONFIG_FILE", none)
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", none)
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	for name, value := range env {
		t.Setenv(name, value)
	}
}

func TestCredentialsOfThePod(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("web identity"), 0o600); err != nil {
		t.Fatal(err)
	}
	sts := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.FormValue("Action") != "AssumeRoleWithWebIdentity" || r.FormValue("WebIdentityToken") != "web identity" {
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		w.Write([]byte(`<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult><Credentials>
			<AccessKeyId>ASIAROLE</AccessKeyId><SecretAccessKey>role's key</SecretAccessKey><SessionToken>role's token</SessionToken><Expiration>2126-01-01T00:00:00Z</Expiration>
			</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>`))
	}))
	defer sts.Close()
	agent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "web identity" {
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		w.Write([]byte(`{"AccessKeyId":"ASIAPOD","SecretAccessKey":"pod's key","Token":"pod's token","Expiration":"2126-01-01T00:00:00Z"}`))
	}))
	defer agent.Close()
	for name, tt := range map[string]struct {
		env  map[string]string
		want string
	}{
		"environment":       {map[string]string{"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "key", "AWS_SESSION_TOKEN": "token"}, "AKIA key token"},
		"IRSA":              {map[string]string{"AWS_ROLE_ARN": "arn:aws:iam::111122223333:role/pod", "AWS_WEB_IDENTITY_TOKEN_FILE": token, "AWS_ENDPOINT_URL_STS": sts.URL}, "ASIAROLE role's key role's token"},
		"EKS Pod Identity":  {map[string]string{"AWS_CONTAINER_CREDENTIALS_FULL_URI": agent.URL, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": token}, "ASIAPOD pod's key pod's token"},
		"nothing to be had": {nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			alone(t, tt.env)
			provider, err := awsCredentials(t.Context(), "eu-central-1")
			if err != nil {
				t.Fatal(err)
			}
			server := httptest.NewServer(credentialsHandler(provider))
			defer server.Close()
			// The enclave asks with the SDK's own client.
			c, err := endpointcreds.New(server.URL, func(o *endpointcreds.Options) { o.Retryer = aws.NopRetryer{} }).Retrieve(t.Context())
			if tt.want == "" {
				if err == nil || !strings.Contains(err.Error(), "NoCredentials: the pod has no AWS credentials, give it some") {
					t.Errorf("got %v, %v", c, err)
				}
				return
			}
			if got := c.AccessKeyID + " " + c.SecretAccessKey + " " + c.SessionToken; err != nil || got != tt.want {
				t.Errorf("got %q, %v; want %q", got, err, tt.want)
			}
			if c.CanExpire != (name != "environment") {
				t.Errorf("expires: %v", c.CanExpire)
			}
		})
	}
}

// Only who knows the enclave's secret gets credentials.
func TestCredentialsPort(t *testing.T) {
	alone(t, map[string]string{"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "key"})
	r := startWith(t, func(c *config) { c.awsRegion, c.egress = "eu-central-1", []string{"kms.example:443"} })
	r.pod.set(enclave(t, r.port, 1, "first"))
	state := r.pod.egressPort(t)
	if state.GetCredentialsPort() == 0 || state.GetCredentialsPort() == state.GetEgressPort() {
		t.Fatalf("registered %v", state)
	}
	guest := strings.TrimPrefix(state.GetTarget(), "unix://")
	ask := func(secret vsock.Secret) (aws.Credentials, error) {
		transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return secret.Dial(ctx, state.GetCredentialsPort(), func(ctx context.Context, port uint32) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", vsock.HostPath(guest, port))
			})
		}}
		return endpointcreds.New("http://sidecar/", func(o *endpointcreds.Options) {
			o.HTTPClient, o.Retryer = &http.Client{Transport: transport}, aws.NopRetryer{}
		}).Retrieve(t.Context())
	}
	if c, err := ask(vsock.Secret(state.GetSecret())); err != nil || c.AccessKeyID != "AKIA" {
		t.Errorf("got %q, %v", c.AccessKeyID, err)
	}
	if c, err := ask(vsock.NewSecret()); err == nil {
		t.Errorf("a stranger gets %q", c.AccessKeyID)
	}
	if strings.Contains(r.log.String(), "AKIA") {
		t.Error("the log has the credentials")
	}
}
