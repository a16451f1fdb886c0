package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The workload reaches an ordinary TLS server of the cluster by its name, with an ordinary client, and the
// host sees TLS. What its config does not name does not resolve.
func TestEgress(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	// Services first: one server is known by its address, too.
	for _, name := range []string{"allowed", "denied"} {
		ns.create(t, service(name, 8443))
	}
	host := func(name string) string { return fmt.Sprintf("%s.%s.svc.cluster.local", name, ns.name) }
	allowed, err := c.kube.CoreV1().Services(ns.name).Get(t.Context(), "allowed", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ip := allowed.Spec.ClusterIP
	certificate, key := tlsServer(t, net.ParseIP(ip), host("allowed"), host("denied"))
	for _, name := range []string{"allowed", "denied"} {
		ns.create(t, c.tlsPod(t, name, certificate, key))
	}

	pod := c.appPod(t, "app")
	pod.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "CA_CERT", Value: certificate}}
	pod.Annotations["cloister.dev/config"] = fmt.Sprintf(
		"apiVersion: cloister.dev/v1alpha1\nkind: EnclaveConfig\negress: ['%s:443', '%s:443', '%s:443']\n", host("allowed"), host("nobody"), ip)
	set, _ := c.measure(t, pod)
	ns.create(t, pod)
	for _, name := range []string{"allowed", "denied"} {
		ns.ready(t, name, 1)
	}
	running := ns.ready(t, "app", 1)[0]
	addr := ns.forward(t, "pod/app", 8080)
	get := func(target string) string { return c.answer(t, addr, set, "/get?url="+url.QueryEscape(target)) }

	dir := "/var/lib/kubelet/pods/" + string(running.UID) + "/volumes/kubernetes.io~empty-dir/cloister-run/vsock/1"
	// The sidecar's socket is the one with the sidecar's uid.
	socket := strings.TrimSpace(c.onNode(t, `cd "$1"; find . -name 'vsock.sock_*' -user 65532`, dir))
	recorder, _ := c.start(t, "record", dir, strings.TrimPrefix(socket, "./"))
	const secret = "only-the-two-ends-may-read-this"
	if got := get("https://" + host("allowed") + "/echo?" + secret); got != secret {
		t.Errorf("the allowed server: got %q", got)
	}
	seen := recorder.stop(t)
	if !bytes.Contains(seen, []byte(host("allowed"))) || !bytes.Contains(seen, []byte{22, 3, 1}) {
		t.Errorf("the recorder saw no TLS greeting in %d bytes: it does not stand where the data pass", len(seen))
	}
	if bytes.Contains(seen, []byte(secret)) || bytes.Contains(seen, []byte("HTTP/1.1")) {
		t.Error("the recorder saw the request in the clear")
	}
	if got := get("https://" + ip + "/echo?address"); got != "address" {
		t.Errorf("the allowed server by its address: got %q", got)
	}

	// The other server works for everybody else.
	conn, err := tls.Dial("tcp", ns.forward(t, "service/denied", 443), &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Errorf("the denied server does not serve: %v", err)
	} else {
		conn.Close()
	}
	for name, tt := range map[string]struct{ target, want string }{
		"not allowed":      {"https://" + host("denied") + "/", "lookup " + host("denied")},
		"another port":     {"https://" + host("allowed") + ":8443/", "connection refused"},
		"another address":  {"https://10.255.255.254/", "network is unreachable"},
		"allowed, nowhere": {"https://" + host("nobody") + "/", "EOF"},
	} {
		got := get(tt.target)
		got = strings.Replace(got, "connection reset by peer", "EOF", 1) // closed without a byte, either way
		if !strings.HasPrefix(got, "error: ") || !strings.Contains(got, tt.want) {
			t.Errorf("%s: got %q, want an error with %q", name, got, tt.want)
		}
	}
	if log := ns.logs(t, "app", initbootContainer); !strings.Contains(log, `"target":"`+host("nobody")+`:443"`) {
		t.Errorf("no log line names the target that could not be reached: %s", log)
	}
}

// tlsPod is an ordinary pod of testapp that speaks TLS on port 8443.
func (c *cluster) tlsPod(t *testing.T, name, certificate, key string) *corev1.Pod {
	t.Helper()
	pod := c.appPod(t, name, "serve", "-listen", ":8443", "-tls")
	pod.Annotations = nil
	app := &pod.Spec.Containers[0]
	app.Image, app.ImagePullPolicy = localImage, corev1.PullNever
	app.Env = []corev1.EnvVar{{Name: "TLS_CERT", Value: certificate}, {Name: "TLS_KEY", Value: key}}
	app.Ports[0].ContainerPort = 8443
	return pod
}

// tlsServer makes a certificate that is its own root, and its key, in PEM.
func tlsServer(t *testing.T, ip net.IP, names ...string) (certificate, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "e2e"},
		DNSNames: names, IPAddresses: []net.IP{ip},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	encode := func(kind string, b []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}))
	}
	return encode("CERTIFICATE", der), encode("PRIVATE KEY", raw)
}
