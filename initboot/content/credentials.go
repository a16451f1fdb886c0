package content

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// Files of a pull secret, as the types kubernetes.io/dockerconfigjson and kubernetes.io/dockercfg have them.
const (
	dockerConfigJSON = ".dockerconfigjson"
	dockerConfig     = ".dockercfg"
)

// pullSecrets is a folder with the pod's imagePullSecrets, laid out as podenv.PullSecretsDir. The kubelet
// keeps it up to date.
type pullSecrets string

// entry is what a pull secret has for one place.
type entry struct {
	Username string `json:"username"`
	Password string `json:"password"`
	Auth     string `json:"auth"` // base64 of USERNAME:PASSWORD, wins over both
}

// lookup returns the credentials that may open a repository, in the order in which they are tried: the
// kubelet's (k8s.io/kubernetes/pkg/credentialprovider), which goes by host, where a * stands for part of a name between
// dots, by port, and by the beginning of the path; what is longer comes first. Errors name no content.
func (s pullSecrets) lookup(repo name.Repository) ([]authn.Authenticator, error) {
	places := map[string][]authn.Authenticator{}
	secrets, err := s.folders()
	if err != nil {
		return nil, err
	}
	for _, n := range secrets {
		entries, err := s.read(n)
		if err != nil {
			return nil, err
		}
		for _, place := range slices.Sorted(maps.Keys(entries)) {
			e := entries[place]
			if e.Auth != "" {
				if e.Username, e.Password, err = decodeAuth(e.Auth); err != nil {
					return nil, fmt.Errorf("number %d of the pod's imagePullSecrets has for %q an auth that is not base64 of USERNAME:PASSWORD: correct it", n+1, place)
				}
			}
			if key, ok := normalize(place); ok {
				places[key] = append(places[key], authn.FromConfig(authn.AuthConfig{Username: e.Username, Password: e.Password}))
			}
		}
	}
	// The kubelet knows the default registry by this name.
	target := strings.Replace(repo.Name(), name.DefaultRegistry+"/", "docker.io/", 1)
	var found []authn.Authenticator
	keys := slices.Sorted(maps.Keys(places))
	for _, key := range slices.Backward(keys) {
		if opens(key, target) {
			found = append(found, places[key]...)
		}
	}
	if len(found) == 0 && repo.RegistryStr() == name.DefaultRegistry {
		found = places[name.DefaultRegistry]
	}
	return found, nil
}

// folders returns the numbers of the pull secrets, in their order.
func (s pullSecrets) folders() ([]int, error) {
	list, err := os.ReadDir(string(s))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read pull secrets: %w", err)
	}
	var out []int
	for _, e := range list {
		if n, err := strconv.Atoi(e.Name()); err == nil { // beside ..data, which is the kubelet's
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out, nil
}

// read returns the entries of one pull secret; none where it is missing or of another type.
func (s pullSecrets) read(n int) (entries map[string]entry, err error) {
	dir := filepath.Join(string(s), strconv.Itoa(n))
	data, err := os.ReadFile(filepath.Join(dir, dockerConfigJSON))
	if err == nil {
		var file struct {
			Auths map[string]entry `json:"auths"`
		}
		err = json.Unmarshal(data, &file)
		entries = file.Auths
	} else if errors.Is(err, fs.ErrNotExist) {
		if data, err = os.ReadFile(filepath.Join(dir, dockerConfig)); errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		} else if err == nil {
			err = json.Unmarshal(data, &entries)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("number %d of the pod's imagePullSecrets cannot be read as a Docker configuration: correct it", n+1)
	}
	return entries, nil
}

func decodeAuth(auth string) (username, password string, err error) {
	text, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(auth, "="))
	if err != nil {
		return "", "", err
	}
	username, password, ok := strings.Cut(string(text), ":")
	if !ok {
		return "", "", errors.New("no colon")
	}
	return username, password, nil
}

// normalize returns HOST[:PORT][/PATH] of what a Docker configuration calls a registry.
func normalize(place string) (string, bool) {
	if !strings.HasPrefix(place, "https://") && !strings.HasPrefix(place, "http://") {
		place = "https://" + place
	}
	u, err := url.Parse(place)
	if err != nil {
		return "", false
	}
	for _, version := range []string{"/v1/", "/v2/"} { // of the registry's interface, and no repository
		if rest, ok := strings.CutPrefix(u.Path, version); ok {
			u.Path = "/" + rest
		}
	}
	if u.Path == "/" {
		u.Path = ""
	}
	return u.Host + u.Path, true
}

// opens tells whether credentials for a place are for a repository.
func opens(place, repository string) bool {
	host, below, _ := strings.Cut(place, "/")
	targetHost, targetPath, _ := strings.Cut(repository, "/")
	hosts, port := split(host)
	targetHosts, targetPort := split(targetHost)
	if port != targetPort || len(hosts) != len(targetHosts) || !strings.HasPrefix(targetPath, below) {
		return false
	}
	for i, h := range hosts {
		if ok, err := path.Match(h, targetHosts[i]); err != nil || !ok {
			return false
		}
	}
	return true
}

// split returns the parts of a host's name, and its port.
func split(host string) (parts []string, port string) {
	if h, p, err := net.SplitHostPort(host); err == nil {
		host, port = h, p
	}
	return strings.Split(host, "."), port
}
