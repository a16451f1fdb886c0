package envoy

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
)

// maxAnswer is more than the admin socket answers to any of our questions, in bytes.
const maxAnswer = 1 << 20

// Admin asks a running Envoy for its state over its admin socket.
type Admin struct{ client http.Client }

// NewAdmin returns an Admin for the socket at path.
func NewAdmin(path string) *Admin {
	return &Admin{client: http.Client{Transport: &http.Transport{
		DisableKeepAlives: true, // seldom asked
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		},
	}}}
}

// Live returns nil when Envoy has its first configuration and its workers run.
func (a *Admin) Live(ctx context.Context) error {
	_, err := a.get(ctx, "/ready")
	return err
}

// Listeners returns the names of the listeners that accept connections.
func (a *Admin) Listeners(ctx context.Context) ([]string, error) {
	body, err := a.get(ctx, "/listeners?format=json")
	if err != nil {
		return nil, err
	}
	var answer struct { // envoy.admin.v3.Listeners
		ListenerStatuses []struct {
			Name string `json:"name"`
		} `json:"listener_statuses"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return nil, fmt.Errorf("read envoy's listeners: %w", err)
	}
	var names []string
	for _, l := range answer.ListenerStatuses {
		names = append(names, l.Name)
	}
	return names, nil
}

// Connections returns how many connections clients have to listeners, also to those that were taken
// away and drain.
func (a *Admin) Connections(ctx context.Context) (int, error) {
	body, err := a.get(ctx, "/stats?filter=^listener\\..*\\.downstream_cx_active$")
	if err != nil {
		return 0, err
	}
	total := 0
	for line := range strings.Lines(string(body)) { // listener.0.0.0.0_80.downstream_cx_active: 3
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		if strings.HasPrefix(name, "listener.admin.") || strings.Contains(name, ".worker_") {
			continue // our own; counted twice
		}
		n, err := strconv.Atoi(value)
		if err != nil {
			return 0, fmt.Errorf("read envoy's statistics: %w", err)
		}
		total += n
	}
	return total, nil
}

func (a *Admin) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://envoy"+path, nil)
	if err != nil {
		return nil, err
	}
	res, err := a.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask envoy: %w", err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("ask envoy: %w", err)
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("envoy answers %q", strings.TrimSpace(string(body)))
	}
	return body, nil
}
