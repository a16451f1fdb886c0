package content

import (
	"encoding/base64"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
)

// writeSecrets lays pull secrets out as the kubelet does: each a file name and its content.
func writeSecrets(t testing.TB, secrets ...[2]string) string {
	t.Helper()
	dir := t.TempDir()
	data := filepath.Join(dir, "..data")
	for i, s := range secrets {
		number := strconv.Itoa(i)
		if s[0] == "" { // a Secret that is missing
			continue
		}
		if err := os.MkdirAll(filepath.Join(data, number), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(data, number, s[0]), []byte(s[1]), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join("..data", number), filepath.Join(dir, number)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// auths is a Docker configuration whose every place has its own name as user.
func auths(places ...string) string {
	var list []string
	for _, p := range places {
		list = append(list, fmt.Sprintf("%q:{%q:%q,%q:%q}", p, "username", p, "password", "p"))
	}
	return `{"auths":{` + strings.Join(list, ",") + `}}`
}

func TestLookup(t *testing.T) {
	encoded := base64.StdEncoding.EncodeToString([]byte("u:p:q"))
	for title, tc := range map[string]struct {
		secrets [][2]string
		image   string
		want    []string // users
		err     string
	}{
		"no secrets":         {image: "registry.example/a"},
		"missing":            {secrets: [][2]string{{}, {dockerConfigJSON, auths("registry.example")}}, image: "registry.example/a", want: []string{"registry.example"}},
		"other type":         {secrets: [][2]string{{"token", "x"}}, image: "registry.example/a"},
		"host":               {secrets: [][2]string{{dockerConfigJSON, auths("registry.example", "other.example")}}, image: "registry.example/team/a", want: []string{"registry.example"}},
		"port":               {secrets: [][2]string{{dockerConfigJSON, auths("registry.example", "registry.example:5000")}}, image: "registry.example:5000/a", want: []string{"registry.example:5000"}},
		"scheme and version": {secrets: [][2]string{{dockerConfigJSON, auths("https://registry.example/v2/", "http://registry.example/v1/team")}}, image: "registry.example/team/a", want: []string{"http://registry.example/v1/team", "https://registry.example/v2/"}},
		"longest first":      {secrets: [][2]string{{dockerConfigJSON, auths("registry.example", "registry.example/team", "registry.example/team/a", "registry.example/b")}}, image: "registry.example/team/a", want: []string{"registry.example/team/a", "registry.example/team", "registry.example"}},
		"end of a path":      {secrets: [][2]string{{dockerConfigJSON, auths("registry.example/team/")}}, image: "registry.example/teams/a"},
		"wildcard":           {secrets: [][2]string{{dockerConfigJSON, auths("*.example", "*.*.example", "*")}}, image: "registry.example/a", want: []string{"*.example"}},
		"broken wildcard":    {secrets: [][2]string{{dockerConfigJSON, auths("[.example")}}, image: "registry.example/a"},
		"Docker Hub":         {secrets: [][2]string{{dockerConfigJSON, auths("https://index.docker.io/v1/")}}, image: "nginx", want: []string{"https://index.docker.io/v1/"}},
		"Docker Hub by name": {secrets: [][2]string{{dockerConfigJSON, auths("docker.io/library", "index.docker.io")}}, image: "nginx", want: []string{"docker.io/library"}},
		"not Docker Hub":     {secrets: [][2]string{{dockerConfigJSON, auths("index.docker.io")}}, image: "registry.example/nginx"},
		"order of secrets":   {secrets: [][2]string{{dockerConfig, `{"registry.example":{"username":"first"}}`}, {dockerConfigJSON, auths("registry.example")}}, image: "registry.example/a", want: []string{"first", "registry.example"}},
		"auth wins":          {secrets: [][2]string{{dockerConfigJSON, `{"auths":{"registry.example":{"username":"x","auth":"` + encoded + `"}}}`}}, image: "registry.example/a", want: []string{"u"}},
		"auth without =":     {secrets: [][2]string{{dockerConfigJSON, `{"auths":{"registry.example":{"auth":"` + strings.TrimRight(encoded, "=") + `"}}}`}}, image: "registry.example/a", want: []string{"u"}},
		"auth of nothing":    {secrets: [][2]string{{dockerConfigJSON, `{"auths":{"registry.example":{"auth":"c2VjcmV0"}}}`}}, image: "registry.example/a", err: "number 1 of the pod's imagePullSecrets"},
		"no JSON":            {secrets: [][2]string{{}, {dockerConfigJSON, "secret"}}, image: "registry.example/a", err: "number 2 of the pod's imagePullSecrets cannot be read"},
	} {
		t.Run(title, func(t *testing.T) {
			ref, err := name.ParseReference(tc.image)
			if err != nil {
				t.Fatal(err)
			}
			found, err := pullSecrets(writeSecrets(t, tc.secrets...)).lookup(ref.Context())
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) || strings.Contains(err.Error(), "secret\"") || strings.Contains(err.Error(), "c2Vj") {
					t.Errorf("error %v, want %q", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, f := range found {
				a, err := f.Authorization()
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, a.Username)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("users (-want +got):\n%s", diff)
			}
		})
	}
}

func FuzzLookup(f *testing.F) {
	f.Add(auths("https://registry.example:5000/v2/team", "*.example"), "registry.example:5000/team/a")
	f.Add(`{"auths":{"x":{"auth":"dTpw"}}}`, "x/y")
	f.Fuzz(func(t *testing.T, config, image string) {
		ref, err := name.ParseReference(image)
		if err != nil {
			t.Skip()
		}
		pullSecrets(writeSecrets(t, [2]string{dockerConfigJSON, config})).lookup(ref.Context())
	})
}

// TestPrivate: each credential is tried until one opens the registry, for all of an image; who has none
// is told what to do.
func TestPrivate(t *testing.T) {
	u := newUpstream(t)
	img := image(t)
	d, err := name.NewDigest(u.push(t, img))
	if err != nil {
		t.Fatal(err)
	}
	private := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "right" || password != "p" {
			w.Header().Set("WWW-Authenticate", `Basic realm="private"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		u.Config.Handler.ServeHTTP(w, r)
	}))
	t.Cleanup(private.Close)
	host := private.Listener.Addr().String()
	ref := host + "/" + d.Context().RepositoryStr() + "@" + d.DigestStr()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	config := func(user string) string {
		return fmt.Sprintf(`{"auths":{%q:{"username":%q,"password":"p"}}}`, host, user)
	}
	for title, tc := range map[string]struct {
		secrets [][2]string
		refused string
	}{
		"right":            {secrets: [][2]string{{dockerConfigJSON, config("right")}}},
		"second":           {secrets: [][2]string{{dockerConfigJSON, config("wrong")}, {dockerConfigJSON, config("right")}}},
		"none":             {refused: "without credentials, and the pod's imagePullSecrets have none for it: add a Secret of the type kubernetes.io/dockerconfigjson"},
		"wrong":            {secrets: [][2]string{{dockerConfigJSON, config("wrong")}}, refused: "with the credentials that the pod's imagePullSecrets have for it"},
		"for another":      {secrets: [][2]string{{dockerConfigJSON, auths("registry.example")}}, refused: "without credentials"},
		"cannot be read":   {secrets: [][2]string{{dockerConfigJSON, "{"}}, refused: "number 1 of the pod's imagePullSecrets cannot be read"},
		"wrong, elsewhere": {secrets: [][2]string{{dockerConfigJSON, config("wrong")}, {dockerConfigJSON, auths("registry.example")}}, refused: "correct them"},
	} {
		t.Run(title, func(t *testing.T) {
			var logged strings.Builder
			s, err := New(ref, nil, local, writeSecrets(t, tc.secrets...), t.TempDir(), 1<<20, slog.New(slog.NewTextHandler(&logged, nil)))
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			digests := []string{"/manifests/" + d.DigestStr()}
			if tc.refused == "" {
				for _, l := range layers {
					digest, err := l.Digest()
					if err != nil {
						t.Fatal(err)
					}
					digests = append(digests, "/blobs/"+digest.String())
				}
			}
			for _, path := range digests {
				w := get(s, path)
				switch {
				case tc.refused == "" && w.Code != http.StatusOK:
					t.Errorf("%s: %d %s", path, w.Code, w.Body)
				case tc.refused != "" && (w.Code != http.StatusBadGateway || !strings.Contains(w.Body.String(), tc.refused)):
					t.Errorf("%s: %d %s, want %q", path, w.Code, w.Body, tc.refused)
				}
			}
			if strings.Contains(logged.String(), "right") || strings.Contains(logged.String(), "wrong") {
				t.Errorf("the log tells a credential: %s", logged.String())
			}
		})
	}
}
