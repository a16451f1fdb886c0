package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// realm is what Keycloak imports. A reader's tokens have the audience and the scope that the workload
// wants, a guest's the audience alone and a stranger's neither.
const realm = `{
  "realm": "cloister", "enabled": true,
  "clientScopes": [
    {"name": "shop:read", "protocol": "openid-connect", "attributes": {"include.in.token.scope": "true"}},
    {"name": "for-shop", "protocol": "openid-connect", "attributes": {"include.in.token.scope": "false"}, "protocolMappers": [{
      "name": "shop", "protocol": "openid-connect", "protocolMapper": "oidc-audience-mapper",
      "config": {"included.custom.audience": "shop", "access.token.claim": "true"}}]},
    {"name": "for-library", "protocol": "openid-connect", "attributes": {"include.in.token.scope": "false"}, "protocolMappers": [{
      "name": "library", "protocol": "openid-connect", "protocolMapper": "oidc-audience-mapper",
      "config": {"included.custom.audience": "library", "access.token.claim": "true"}}]}
  ],
  "clients": [
    {"clientId": "reader", "secret": "e2e", "serviceAccountsEnabled": true, "standardFlowEnabled": false, "defaultClientScopes": ["for-shop", "shop:read"]},
    {"clientId": "guest", "secret": "e2e", "serviceAccountsEnabled": true, "standardFlowEnabled": false, "defaultClientScopes": ["for-shop"]},
    {"clientId": "stranger", "secret": "e2e", "serviceAccountsEnabled": true, "standardFlowEnabled": false, "defaultClientScopes": ["for-library", "shop:read"]}
  ]
}`

// keycloak is a real one in the cluster, as an issuer of tokens.
type keycloak struct {
	issuer string
	ca     []byte // PEM
	client *http.Client
}

// startKeycloak starts Keycloak in the namespace. It takes half a minute, so wait comes later.
func startKeycloak(t *testing.T, ns *namespace) *keycloak {
	t.Helper()
	host := "keycloak." + ns.name + ".svc.cluster.local"
	k := &keycloak{issuer: "https://" + host + ":8443/realms/cloister"}
	cert, key := certificate(t, host)
	k.ca = cert
	create(t, ns, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "keycloak"}, Data: map[string][]byte{"tls.crt": cert, "tls.key": key},
	}, &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "keycloak"}, Data: map[string]string{"realm.json": realm},
	})
	no := false
	ns.create(t, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "keycloak", Labels: map[string]string{"app": "keycloak"}},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: new(int64(0)), AutomountServiceAccountToken: &no, EnableServiceLinks: &no,
			Containers: []corev1.Container{{
				Name: "keycloak", Image: setting(t, "CLOISTER_KEYCLOAK_IMAGE"), ImagePullPolicy: corev1.PullNever,
				Args: []string{
					"start", "--optimized", "--import-realm", "--hostname=https://" + host + ":8443",
					"--https-certificate-file=/tls/tls.crt", "--https-certificate-key-file=/tls/tls.key",
				},
				Env:   []corev1.EnvVar{{Name: "JAVA_OPTS_KC_HEAP", Value: "-Xms64m -Xmx320m"}},
				Ports: []corev1.ContainerPort{{ContainerPort: 8443}},
				ReadinessProbe: &corev1.Probe{
					ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/health/ready", Port: intstr.FromInt(9000), Scheme: corev1.URISchemeHTTPS}},
					PeriodSeconds: 1, TimeoutSeconds: 5, FailureThreshold: 1,
				},
				Resources: corev1.ResourceRequirements{
					Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("100m"), corev1.ResourceMemory: resource.MustParse("768Mi")},
					Limits:   corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("768Mi")},
				},
				VolumeMounts: []corev1.VolumeMount{{Name: "tls", MountPath: "/tls"}, {Name: "realm", MountPath: "/opt/keycloak/data/import"}},
			}},
			Volumes: []corev1.Volume{
				{Name: "tls", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "keycloak"}}},
				{Name: "realm", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "keycloak"}}}},
			},
		},
	})
	s := service("keycloak", 8443)
	s.Spec.Ports[0].Port = 8443
	ns.create(t, s)
	return k
}

// wait waits until Keycloak issues tokens.
func (k *keycloak) wait(t *testing.T, ns *namespace) {
	t.Helper()
	eventually(t, 3*time.Minute, "Keycloak is ready", func() (bool, string) {
		p := ns.pod(t, "keycloak")
		return isReady(p), state(p)
	})
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(k.ca)
	addr := ns.forward(t, "pod/keycloak", 8443)
	k.client = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", addr)
		},
	}}
	t.Cleanup(k.client.CloseIdleConnections)
}

// token gets an access token by a client's credentials (RFC 6749, section 4.4).
func (k *keycloak) token(t *testing.T, client string) string {
	t.Helper()
	r, err := k.client.PostForm(k.issuer+"/protocol/openid-connect/token", url.Values{
		"grant_type": {"client_credentials"}, "client_id": {client}, "client_secret": {"e2e"},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	var answer struct {
		Token string `json:"access_token"`
	}
	if err := json.NewDecoder(r.Body).Decode(&answer); err != nil || answer.Token == "" {
		t.Fatalf("no token for %s: status %d, %v", client, r.StatusCode, err)
	}
	return answer.Token
}

// certificate is a self-signed certificate for a host and its key, both PEM.
func certificate(t *testing.T, host string) (cert, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: host}, DNSNames: []string{host},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}

// create submits a Secret and a ConfigMap.
func create(t *testing.T, ns *namespace, secret *corev1.Secret, config *corev1.ConfigMap) {
	t.Helper()
	if _, err := ns.kube.CoreV1().Secrets(ns.name).Create(t.Context(), secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := ns.kube.CoreV1().ConfigMaps(ns.name).Create(t.Context(), config, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// setting is one that only some tests need.
func setting(t *testing.T, name string) string {
	t.Helper()
	v := os.Getenv(name)
	if v == "" {
		t.Fatalf("%s is not set: run `make test-e2e`", name)
	}
	return v
}

// enclaveConfig is the annotation with these settings, which are YAML or JSON.
func enclaveConfig(pod *corev1.Pod, settings map[string]any) {
	settings["apiVersion"], settings["kind"] = "cloister.dev/v1alpha1", "EnclaveConfig"
	b, err := json.Marshal(settings)
	if err != nil {
		panic(err) // maps of text
	}
	pod.Annotations["cloister.dev/config"] = string(b)
}

// answered is the answer to a request: its status, its header in one text, and its body.
type answered struct {
	status       int
	header, body string
}

// request asks the enclave at addr, whose attestation must be right.
func (c *cluster) request(t *testing.T, addr, set, path string, headers ...string) answered {
	t.Helper()
	args := []string{"-i", "--http1.1"}
	for _, h := range headers {
		args = append(args, "-H", h)
	}
	r := c.curl(t, addr, set, path, args...)
	if r.code != 0 {
		t.Fatalf("cloister curl %s: exit code %d: %s", path, r.code, r.stderr)
	}
	header, body, _ := strings.Cut(strings.ReplaceAll(r.stdout, "\r\n", "\n"), "\n\n")
	var a answered
	if _, err := fmt.Sscanf(header, "HTTP/1.1 %d", &a.status); err != nil {
		t.Fatalf("cloister curl -i printed %q", r.stdout)
	}
	a.header, a.body = strings.ToLower(header), body
	return a
}

// Requests reach the workload with a token of the issuer, for the right audience and with the right scope
// alone; the workload sees who asks, and a client cannot pretend. While the plugin is down nothing passes.
func TestOIDC(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	k := startKeycloak(t, ns)
	pod := c.appPod(t, "app")
	enclaveConfig(pod, map[string]any{"plugins": []any{map[string]any{
		"name": "tokens", "type": "authentication", "builtin": "oidc", "timeout": "2s", // on a busy machine
		"config": map[string]any{
			"issuer": k.issuer, "audience": "shop", "scopes": []string{"shop:read"}, "ca": string(k.ca),
			"claims": map[string]string{"azp": "x-client"},
		},
	}}})
	d := deployment(pod, 1)
	set, entry := c.measure(t, d)
	other := pod.DeepCopy()
	other.Annotations["cloister.dev/config"] = strings.Replace(pod.Annotations["cloister.dev/config"], `"audience":"shop"`, `"audience":"library"`, 1)
	if _, changed := c.measure(t, deployment(other, 1)); changed.PCR16 == entry.PCR16 {
		t.Error("another audience measures the same")
	}
	ns.create(t, d)
	k.wait(t, ns)
	p := ns.ready(t, "app", 1)[0]
	addr := ns.forward(t, "pod/"+p.Name, 8080)

	good := "Authorization: Bearer " + k.token(t, "reader")
	bad := good[:len(good)-4] + "AAAA"
	for name, tt := range map[string]struct {
		headers   []string
		status    int
		challenge string // in WWW-Authenticate
	}{
		"no token":        {nil, 401, `bearer realm="cloister"`},
		"bad signature":   {[]string{bad}, 401, `error="invalid_token"`},
		"password":        {[]string{"Authorization: Basic YTpi"}, 401, `bearer realm="cloister"`},
		"two tokens":      {[]string{good, good}, 400, `error="invalid_request"`},
		"wrong audience":  {[]string{"Authorization: Bearer " + k.token(t, "stranger")}, 403, `error="insufficient_scope"`},
		"without a scope": {[]string{"Authorization: Bearer " + k.token(t, "guest")}, 403, `error="insufficient_scope"`},
	} {
		t.Run(name, func(t *testing.T) {
			a := c.request(t, addr, set, "/echo?secret", tt.headers...)
			if a.status != tt.status || !strings.Contains(a.header, "www-authenticate: ") || !strings.Contains(a.header, tt.challenge) {
				t.Errorf("status %d, want %d; header %s", a.status, tt.status, a.header)
			}
			if strings.Contains(a.body, "secret") {
				t.Errorf("the workload has answered: %s", a.body)
			}
		})
	}

	forged := []string{"X-Cloister-Sub: root", "X_Cloister_Sub: root", "X-Client: root", "X-Cloister-Other: root", "Connection: X-Cloister-Sub"}
	a := c.request(t, addr, set, "/headers", append(forged, good)...)
	var headers http.Header
	if err := json.Unmarshal([]byte(a.body), &headers); a.status != 200 || err != nil {
		t.Fatalf("with a good token: status %d, %s, %v", a.status, a.body, err)
	}
	if got := headers["X-Client"]; !slices.Equal(got, []string{"reader"}) {
		t.Errorf("X-Client: %q", got)
	}
	if got := headers["X-Cloister-Iss"]; !slices.Equal(got, []string{k.issuer}) {
		t.Errorf("X-Cloister-Iss: %q", got)
	}
	if got := headers["X-Cloister-Scope"]; !slices.Equal(got, []string{"shop:read"}) {
		t.Errorf("X-Cloister-Scope: %q", got)
	}
	if got := headers["X-Cloister-Sub"]; len(got) != 1 || len(got[0]) != 36 {
		t.Errorf("X-Cloister-Sub: %q", got)
	}
	if strings.Contains(a.body, "root") {
		t.Errorf("the client's own headers arrive: %s", a.body)
	}
	if got := c.request(t, addr, set, "/count", good); got.body != "0" {
		t.Errorf("refused requests have reached the workload: %s", got.body)
	}

	// As a person would give it.
	token := writeFile(t, "token", []byte(strings.TrimPrefix(good, "Authorization: Bearer ")+"\n"))
	if r := c.curl(t, addr, set, "/echo?order", "--fail", "--bearer-token-file", token); r.code != 0 || r.stdout != "order" {
		t.Errorf("--bearer-token-file: exit code %d, stdout %q, stderr %s", r.code, r.stdout, r.stderr)
	}
	if r := c.curl(t, addr, set, "/echo?order", "--fail"); r.code != 22 || r.stdout != "" || !strings.Contains(r.stderr, "401 Unauthorized") {
		t.Errorf("without --bearer-token-file: exit code %d, stdout %q, stderr %s", r.code, r.stdout, r.stderr)
	}

	// Killed, it is down for a second, and then it is back. Stopped, it is down until it is taken for dead.
	for _, signal := range []string{"KILL", "STOP"} {
		before := ns.pid(t, &p, initbootContainer, "/enclaved oidc")
		c.onNode(t, `kill -"$1" "$2"`, signal, before)
		if a := c.request(t, addr, set, "/headers", good); a.status != 503 || !strings.Contains(a.header, "retry-after") {
			t.Errorf("after SIG%s: status %d, %s", signal, a.status, a.body)
		}
		eventually(t, time.Minute, "the plugin is back", func() (bool, string) {
			a := c.request(t, addr, set, "/headers", good)
			return a.status == 200, fmt.Sprint(a.status, a.body)
		})
		if after := ns.pid(t, &p, initbootContainer, "/enclaved oidc"); after == before {
			t.Errorf("after SIG%s: it is the same process", signal)
		}
	}
	if n := container(ns.pod(t, p.Name), "app").RestartCount; n != 0 {
		t.Errorf("the workload was restarted %d times", n)
	}
}
