package oidc

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"cloister.dev/cloister/workload"
)

// issuer is an OpenID provider as far as the plugin sees one.
type issuer struct {
	*httptest.Server
	ca      []byte // PEM
	fetches atomic.Int64

	mu     sync.Mutex
	keys   []jose.JSONWebKey
	name   string // what it calls itself; empty is the truth
	keysAt string // jwks_uri; empty is the truth
}

func newIssuer(t testing.TB, keys ...jose.JSONWebKey) *issuer {
	t.Helper()
	i := &issuer{keys: keys}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, r *http.Request) {
		i.mu.Lock()
		defer i.mu.Unlock()
		name, keysAt := i.name, i.keysAt
		if name == "" {
			name = i.URL
		}
		if keysAt == "" {
			keysAt = i.URL + "/keys"
		}
		json.NewEncoder(w).Encode(map[string]string{"issuer": name, "jwks_uri": keysAt})
	})
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, r *http.Request) {
		i.fetches.Add(1)
		i.mu.Lock()
		defer i.mu.Unlock()
		json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: i.keys})
	})
	i.Server = httptest.NewTLSServer(mux)
	t.Cleanup(i.Close)
	i.ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Certificate().Raw})
	return i
}

func (i *issuer) set(keys ...jose.JSONWebKey) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.keys = keys
}

// Keys of the tests: those of the issuer and strangers'.
var (
	rsaKey, rsaStranger = newRSA(2048), newRSA(2048)
	weakRSA             = newRSA(1024)
	ecKey, ecStranger   = newEC(), newEC()
	edPublic, edKey, _  = ed25519.GenerateKey(rand.Reader)
)

func newRSA(bits int) *rsa.PrivateKey {
	k, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		panic(err)
	}
	return k
}

func newEC() *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return k
}

func jwk(id, algorithm string, public crypto.PublicKey) jose.JSONWebKey {
	return jose.JSONWebKey{KeyID: id, Algorithm: algorithm, Use: "sig", Key: public}
}

var bigOne = big.NewInt(1)

var now = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)

const issuerName = "https://id.example/realms/a"

// good are the claims of a good token.
func good() map[string]any {
	return map[string]any{
		"iss": issuerName, "aud": []string{"account", "shop"}, "sub": "f3b5", "exp": now.Add(time.Minute).Unix(),
		"iat": now.Add(-time.Minute).Unix(), "scope": "openid shop:read shop:write", "email": "ada@example.org", "level": 3,
	}
}

func with(change map[string]any) map[string]any {
	c := good()
	for k, v := range change {
		if v == nil {
			delete(c, k)
		} else {
			c[k] = v
		}
	}
	return c
}

func b64(v any) string {
	b, ok := v.([]byte)
	if !ok {
		var err error
		if b, err = json.Marshal(v); err != nil {
			panic(err)
		}
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

// sign makes a token with go-jose.
func sign(algorithm string, key any, header, claims map[string]any) string {
	o := (&jose.SignerOptions{})
	for k, v := range header {
		o = o.WithHeader(jose.HeaderKey(k), v)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(algorithm), Key: key}, o)
	if err != nil {
		panic(err)
	}
	b, err := json.Marshal(claims)
	if err != nil {
		panic(err)
	}
	j, err := s.Sign(b)
	if err != nil {
		panic(err)
	}
	t, err := j.CompactSerialize()
	if err != nil {
		panic(err)
	}
	return t
}

// signRS256 signs any header and payload, also those that no library makes.
func signRS256(header, payload string) string {
	in := b64([]byte(header)) + "." + b64([]byte(payload))
	sum := sha256.Sum256([]byte(in))
	s, err := rsa.SignPKCS1v15(rand.Reader, rsaKey, crypto.SHA256, sum[:])
	if err != nil {
		panic(err)
	}
	return in + "." + b64(s)
}

func hs256(secret []byte, kid string) string {
	in := b64(map[string]any{"alg": "HS256", "kid": kid}) + "." + b64(good())
	m := hmac.New(sha256.New, secret)
	m.Write([]byte(in))
	return in + "." + b64(m.Sum(nil))
}

func rs(kid string, claims map[string]any) string {
	return sign("RS256", rsaKey, map[string]any{"kid": kid, "typ": "JWT"}, claims)
}

// testPlugin knows the issuer's keys and needs no network.
func testPlugin(t testing.TB, c workload.OIDC) *Plugin {
	t.Helper()
	c.Issuer, c.Audience = issuerName, "shop"
	s := newKeySet(nil)
	s.keys = []key{
		{"rsa", "RS256", rsaKey.Public()}, {"ec", "", ecKey.Public()}, {"ed", "", edPublic},
	}
	s.fetched, s.tried = time.Now(), time.Now()
	return newPlugin(&c, s, func() time.Time { return now })
}

func check(t testing.TB, p *Plugin, authorization string) *authv3.CheckResponse {
	t.Helper()
	headers := map[string]string{}
	if authorization != "" {
		headers["authorization"] = authorization
	}
	r, err := p.Check(t.Context(), &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{Headers: headers}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestBadTokens: the table in docs/plugins.md says the same.
func TestBadTokens(t *testing.T) {
	p := testPlugin(t, workload.OIDC{Scopes: []string{"shop:read"}})
	spki, err := x509.MarshalPKIXPublicKey(rsaKey.Public())
	if err != nil {
		t.Fatal(err)
	}
	rsaPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki})
	parts := strings.Split(rs("rsa", good()), ".")
	payload := func() string { b, _ := json.Marshal(good()); return string(b) }()
	encrypted := func() string {
		e, err := jose.NewEncrypter(jose.A128GCM, jose.Recipient{Algorithm: jose.RSA_OAEP, Key: rsaKey.Public()}, (&jose.EncrypterOptions{}).WithContentType("JWT"))
		if err != nil {
			t.Fatal(err)
		}
		j, err := e.Encrypt([]byte(rs("rsa", good())))
		if err != nil {
			t.Fatal(err)
		}
		s, err := j.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}()
	twoKeys := fmt.Sprintf(`{"alg":"RS256","kid":"rsa","jwk":%s}`, b64OfJWK(t))
	const request, token, scope, none = "invalid_request", "invalid_token", "insufficient_scope", ""

	tests := map[string]struct {
		authorization string // "Bearer " before it, unless it has a space
		status        int
		code          string
	}{
		"no header":                         {" ", 401, none},
		"another scheme":                    {"Basic YTpi", 401, none},
		"no token":                          {"Bearer ", 400, request},
		"two tokens":                        {"Bearer " + rs("rsa", good()) + ",Bearer " + rs("rsa", good()), 400, request},
		"a token and a password":            {"Bearer " + rs("rsa", good()) + ",Basic YTpi", 400, request},
		"two tokens in one header":          {"Bearer " + rs("rsa", good()) + " " + rs("rsa", good()), 400, request},
		"JSON serialization":                {`Bearer {"payload":"x"}`, 400, request},
		"a token of 1 MB":                   {strings.Repeat("a", 1<<20), 401, token},
		"a good token made too long":        {rs("rsa", with(map[string]any{"pad": strings.Repeat("x", maxToken)})), 401, token},
		"opaque":                            {"8f0d3c0e", 401, token},
		"empty parts":                       {"..", 401, token},
		"two parts":                         {parts[0] + "." + parts[1], 401, token},
		"no signature":                      {parts[0] + "." + parts[1] + ".", 401, token},
		"four parts":                        {strings.Join(parts, ".") + ".x", 401, token},
		"encrypted (JWE)":                   {encrypted, 401, token},
		"alg none":                          {b64(map[string]any{"alg": "none"}) + "." + parts[1] + ".", 401, token},
		"alg None, with a signature":        {b64(map[string]any{"alg": "None", "kid": "rsa"}) + "." + parts[1] + "." + parts[2], 401, token},
		"no alg":                            {b64(map[string]any{"kid": "rsa"}) + "." + parts[1] + "." + parts[2], 401, token},
		"alg twice":                         {signRS256(`{"alg":"RS256","alg":"none","kid":"rsa"}`, payload), 401, token},
		"key confusion: HMAC with the PEM":  {hs256(rsaPEM, "rsa"), 401, token},
		"key confusion: HMAC with the DER":  {hs256(spki, "rsa"), 401, token},
		"HMAC with nothing":                 {hs256(nil, "rsa"), 401, token},
		"algorithm that is not accepted":    {sign("RS512", rsaKey, map[string]any{"kid": "rsa"}, good()), 401, token},
		"PS256 with a key for RS256":        {sign("PS256", rsaKey, map[string]any{"kid": "rsa"}, good()), 401, token},
		"EdDSA, which is not accepted":      {sign("EdDSA", edKey, map[string]any{"kid": "ed"}, good()), 401, token},
		"the RSA key's id on ES256":         {sign("ES256", ecKey, map[string]any{"kid": "rsa"}, good()), 401, token},
		"unknown kid":                       {rs("other", good()), 401, token},
		"kid of another key":                {rs("ec", good()), 401, token},
		"kid is a path":                     {rs("../../rsa", good()), 401, token},
		"kid is a number":                   {signRS256(`{"alg":"RS256","kid":1}`, payload), 401, token},
		"stranger's key, our kid":           {sign("RS256", rsaStranger, map[string]any{"kid": "rsa"}, good()), 401, token},
		"stranger's EC key, our kid":        {sign("ES256", ecStranger, map[string]any{"kid": "ec"}, good()), 401, token},
		"stranger's key, brought along":     {strings.Join([]string{b64([]byte(twoKeys)), parts[1], "AAAA"}, "."), 401, token},
		"ES256 signature of zeros":          {b64(map[string]any{"alg": "ES256", "kid": "ec"}) + "." + parts[1] + "." + b64(make([]byte, 64)), 401, token},
		"payload changed":                   {parts[0] + "." + b64(with(map[string]any{"sub": "root"})) + "." + parts[2], 401, token},
		"header changed":                    {b64(map[string]any{"alg": "RS256", "kid": "rsa", "x": 1}) + "." + parts[1] + "." + parts[2], 401, token},
		"signature cut":                     {parts[0] + "." + parts[1] + "." + parts[2][:100], 401, token},
		"unknown critical extension":        {signRS256(`{"alg":"RS256","kid":"rsa","crit":["x"],"x":1}`, payload), 401, token},
		"a logout token":                    {sign("RS256", rsaKey, map[string]any{"kid": "rsa", "typ": "logout+jwt"}, good()), 401, token},
		"a DPoP proof":                      {sign("RS256", rsaKey, map[string]any{"kid": "rsa", "typ": "dpop+jwt"}, good()), 401, token},
		"typ is a number":                   {signRS256(`{"alg":"RS256","kid":"rsa","typ":1}`, payload), 401, token},
		"payload is not JSON":               {signRS256(`{"alg":"RS256","kid":"rsa"}`, "x"), 401, token},
		"payload is a list":                 {signRS256(`{"alg":"RS256","kid":"rsa"}`, "[]"), 401, token},
		"payload is null":                   {signRS256(`{"alg":"RS256","kid":"rsa"}`, "null"), 401, token},
		"iss twice":                         {signRS256(`{"alg":"RS256","kid":"rsa"}`, `{"iss":"https://evil.example",`+payload[1:]), 401, token},
		"expired":                           {rs("rsa", with(map[string]any{"exp": now.Add(-skew - time.Second).Unix()})), 401, token},
		"never expires":                     {rs("rsa", with(map[string]any{"exp": nil})), 401, token},
		"exp is a string":                   {rs("rsa", with(map[string]any{"exp": "tomorrow"})), 401, token},
		"exp is null":                       {signRS256(`{"alg":"RS256","kid":"rsa"}`, strings.Replace(payload, `"exp":`, `"exp":null,"x":`, 1)), 401, token},
		"exp is negative":                   {rs("rsa", with(map[string]any{"exp": -1})), 401, token},
		"nbf in the future":                 {rs("rsa", with(map[string]any{"nbf": now.Add(skew + time.Second).Unix()})), 401, token},
		"iat in the future":                 {rs("rsa", with(map[string]any{"iat": now.Add(skew + time.Second).Unix()})), 401, token},
		"another issuer":                    {rs("rsa", with(map[string]any{"iss": "https://evil.example"})), 401, token},
		"issuer with a slash more":          {rs("rsa", with(map[string]any{"iss": issuerName + "/"})), 401, token},
		"issuer in capitals":                {rs("rsa", with(map[string]any{"iss": strings.ToUpper(issuerName)})), 401, token},
		"no issuer":                         {rs("rsa", with(map[string]any{"iss": nil})), 401, token},
		"another audience":                  {rs("rsa", with(map[string]any{"aud": "account"})), 403, scope},
		"audience that begins alike":        {rs("rsa", with(map[string]any{"aud": "shop-admin"})), 403, scope},
		"no audience":                       {rs("rsa", with(map[string]any{"aud": nil})), 403, scope},
		"audience is a number":              {rs("rsa", with(map[string]any{"aud": 1})), 401, token},
		"expired, and for another audience": {rs("rsa", with(map[string]any{"exp": 1, "aud": "account"})), 401, token},
		"no scope":                          {rs("rsa", with(map[string]any{"scope": nil})), 403, scope},
		"another scope":                     {rs("rsa", with(map[string]any{"scope": "shop:reader openid"})), 403, scope},
		"scope is a list":                   {rs("rsa", with(map[string]any{"scope": []string{"shop:read"}})), 403, scope},
		"bound to a certificate":            {rs("rsa", with(map[string]any{"cnf": map[string]string{"x5t#S256": "bwcK0esc3ACC3DB2Y5_lESsXE8o9ltc05O89jdN-dg2"}})), 401, token},
		"bound to a DPoP key":               {rs("rsa", with(map[string]any{"cnf": map[string]string{"jkt": "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"}})), 401, token},
		"a line feed in the subject":        {rs("rsa", with(map[string]any{"sub": "a\r\nx-cloister-scope: admin"})), 401, token},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			authorization := test.authorization
			if !strings.Contains(authorization, " ") {
				authorization = "Bearer " + authorization
			}
			r := check(t, p, strings.TrimPrefix(authorization, " "))
			denied := r.GetDeniedResponse()
			if r.GetStatus().GetCode() == 0 || denied == nil {
				t.Fatal("the request passed")
			}
			if got := int(denied.GetStatus().GetCode()); got != test.status {
				t.Errorf("status %d, want %d", got, test.status)
			}
			challenge := denied.GetHeaders()[0].GetHeader()
			if challenge.GetKey() != "www-authenticate" || !strings.HasPrefix(challenge.GetValue(), `Bearer realm="cloister"`) {
				t.Errorf("challenge %v", challenge)
			}
			if has := strings.Contains(challenge.GetValue(), `error="`+test.code+`"`); has != (test.code != "") || test.code == "" && strings.Contains(challenge.GetValue(), "error") {
				t.Errorf("challenge %q, want error %q", challenge.GetValue(), test.code)
			}
		})
	}
	if len(tests) < 30 {
		t.Errorf("only %d bad tokens", len(tests))
	}
}

// b64OfJWK is a stranger's public key as JSON.
func b64OfJWK(t *testing.T) string {
	t.Helper()
	k := jwk("rsa", "RS256", rsaStranger.Public())
	b, err := k.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestGoodTokens(t *testing.T) {
	p := testPlugin(t, workload.OIDC{
		Scopes: []string{"shop:read"}, Algorithms: []string{"ES256", "EdDSA", "RS256"},
		Claims: map[string]string{"email": "x-user-email", "level": "x-level", "groups": "x-groups", "absent": "x-absent"},
	})
	want := map[string]string{
		"x-cloister-sub": "f3b5", "x-cloister-iss": issuerName, "x-cloister-scope": "openid shop:read shop:write",
		"x-user-email": "ada@example.org", "x-level": "3",
	}
	but := func(change map[string]string) map[string]string {
		w := maps.Clone(want)
		for k, v := range change {
			if v == "" {
				delete(w, k)
			} else {
				w[k] = v
			}
		}
		return w
	}
	tests := map[string]struct {
		authorization string
		want          map[string]string
	}{
		"RS256":                   {"Bearer " + rs("rsa", good()), want},
		"ES256":                   {"Bearer " + sign("ES256", ecKey, map[string]any{"kid": "ec"}, good()), want},
		"EdDSA":                   {"Bearer " + sign("EdDSA", edKey, map[string]any{"kid": "ed"}, good()), want},
		"at+jwt":                  {"Bearer " + sign("RS256", rsaKey, map[string]any{"kid": "rsa", "typ": "at+JWT"}, good()), want},
		"without typ or kid":      {"Bearer " + sign("ES256", ecKey, nil, good()), want},
		"scheme in any case":      {"bEaReR " + rs("rsa", good()), want},
		"one audience":            {"Bearer " + rs("rsa", with(map[string]any{"aud": "shop"})), want},
		"expired within the skew": {"Bearer " + rs("rsa", with(map[string]any{"exp": now.Add(-skew + time.Second).Unix()})), want},
		"nbf within the skew":     {"Bearer " + rs("rsa", with(map[string]any{"nbf": now.Add(skew - time.Second).Unix()})), want},
		"a list of groups":        {"Bearer " + rs("rsa", with(map[string]any{"groups": []string{"a", "b,c"}})), but(map[string]string{"x-groups": `["a","b,c"]`})},
		"a large number":          {"Bearer " + rs("rsa", with(map[string]any{"level": 9007199254740993})), but(map[string]string{"x-level": "9007199254740993"})},
		"an object":               {"Bearer " + rs("rsa", with(map[string]any{"groups": json.RawMessage(`{"b": 1.0, "a": "c"}`)})), but(map[string]string{"x-groups": `{"b":1.0,"a":"c"}`})},
		"null":                    {"Bearer " + rs("rsa", with(map[string]any{"level": json.RawMessage("null")})), but(map[string]string{"x-level": ""})},
		"no subject":              {"Bearer " + rs("rsa", with(map[string]any{"sub": nil})), but(map[string]string{"x-cloister-sub": ""})},
		"a subject of any script": {"Bearer " + rs("rsa", with(map[string]any{"sub": "Ada Lövelace"})), but(map[string]string{"x-cloister-sub": "Ada Lövelace"})},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			r := check(t, p, test.authorization)
			if r.GetStatus().GetCode() != 0 {
				t.Fatalf("refused: %v", r)
			}
			got := map[string]string{}
			for _, o := range r.GetOkResponse().GetHeaders() {
				got[o.GetHeader().GetKey()] = o.GetHeader().GetValue()
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("headers (-want +got):\n%s", diff)
			}
		})
	}
}

// live is a plugin that gets its keys from an issuer.
func live(t *testing.T, i *issuer, change func(*workload.OIDC)) (p *Plugin, serving chan bool) {
	t.Helper()
	c := workload.OIDC{Issuer: i.URL, Audience: "shop", CA: string(i.ca)}
	if change != nil {
		change(&c)
	}
	// The loopback device is refused as an issuer's address, so its name is another.
	c.Issuer = strings.Replace(c.Issuer, "127.0.0.1", "example.com", 1)
	i.mu.Lock()
	if i.name == "" {
		i.name = c.Issuer
	}
	if i.keysAt == "" {
		i.keysAt = c.Issuer + "/keys"
	}
	i.mu.Unlock()
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	p, err = Setup(b, func(ctx context.Context, address string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", i.Listener.Addr().String())
	})
	if err != nil {
		t.Fatal(err)
	}
	serving = make(chan bool, 100)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.Run(ctx, func(s bool) { serving <- s })
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return p, serving
}

func (i *issuer) token(p *Plugin, kid string) string {
	c := good()
	c["iss"], c["exp"], c["iat"] = p.config.Issuer, time.Now().Add(time.Minute).Unix(), time.Now().Unix()
	return "Bearer " + rs(kid, c)
}

func TestIssuer(t *testing.T) {
	i := newIssuer(t, jwk("1", "", rsaKey.Public()))
	p, serving := live(t, i, nil)
	if !<-serving {
		t.Fatal("it does not serve")
	}
	if r := check(t, p, i.token(p, "1")); r.GetStatus().GetCode() != 0 {
		t.Fatalf("refused: %v", r)
	}
	// Strangers' key ids cause no fetch soon after the last one.
	for n := range 100 {
		check(t, p, i.token(p, fmt.Sprint("stranger", n)))
	}
	if n := i.fetches.Load(); n != 1 {
		t.Errorf("%d fetches", n)
	}
	// After the pause a key that is new is found at once, and one that is gone is refused.
	i.set(jwk("2", "", rsaKey.Public()))
	p.keys.mu.Lock()
	p.keys.tried = time.Now().Add(-pause)
	p.keys.mu.Unlock()
	if r := check(t, p, i.token(p, "2")); r.GetStatus().GetCode() != 0 {
		t.Errorf("the new key: %v", r)
	}
	if r := check(t, p, i.token(p, "1")); r.GetStatus().GetCode() == 0 {
		t.Error("a token of the old key passes")
	}
	if n := i.fetches.Load(); n != 2 {
		t.Errorf("%d fetches", n)
	}
}

// A stranger's key id is refused in time though the issuer does not answer: without that it would look as
// if the plugin had failed.
func TestUnknownKeyInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fetched := false
		s := newKeySet(func(ctx context.Context) ([]key, error) {
			if fetched {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			fetched = true
			return []key{{id: "1", public: rsaKey.Public()}}, nil
		})
		life, end := context.WithCancel(t.Context())
		defer end()
		go s.run(life, func(bool) {})
		time.Sleep(pause)
		ctx, cancel := context.WithTimeout(t.Context(), workload.DefaultPluginTimeout)
		defer cancel()
		if found, err := s.find(ctx, "stranger", "RS256"); len(found) > 0 || err != nil {
			t.Errorf("found %v, %v", found, err)
		}
		if found, err := s.find(ctx, "1", "RS256"); len(found) != 1 || err != nil {
			t.Errorf("its own key: found %v, %v", found, err)
		}
	})
}

func TestIssuerThatCannotBeUsed(t *testing.T) {
	weak := jwk("1", "", weakRSA.Public())
	tests := map[string]struct {
		change func(*issuer)
		config func(*workload.OIDC)
	}{
		"another name":         {change: func(i *issuer) { i.name = "https://evil.example" }},
		"keys without TLS":     {change: func(i *issuer) { i.keysAt = "http://example.com/keys" }},
		"keys elsewhere":       {change: func(i *issuer) { i.keysAt = "https://example.com/nothing" }},
		"no keys":              {change: func(i *issuer) { i.keys = nil }},
		"weak keys only":       {change: func(i *issuer) { i.keys = []jose.JSONWebKey{weak} }},
		"private keys only":    {change: func(i *issuer) { i.keys = []jose.JSONWebKey{{KeyID: "1", Key: rsaKey}} }},
		"a shared secret only": {change: func(i *issuer) { i.keys = []jose.JSONWebKey{{KeyID: "1", Key: []byte("secret")}} }},
		"keys to encrypt only": {change: func(i *issuer) { i.keys = []jose.JSONWebKey{{KeyID: "1", Use: "enc", Key: rsaKey.Public()}} }},
		"another CA":           {config: func(c *workload.OIDC) { c.CA = otherCA(t) }},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			i := newIssuer(t, jwk("1", "", rsaKey.Public()))
			if test.change != nil {
				test.change(i)
			}
			p, serving := live(t, i, test.config)
			if <-serving {
				t.Error("it serves")
			}
			_, err := p.Check(t.Context(), &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
				Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{Headers: map[string]string{"authorization": i.token(p, "1")}}},
			}})
			if status.Code(err) != codes.Unavailable {
				t.Errorf("a check: %v", err)
			}
		})
	}
}

// otherCA is a certificate of nobody's.
func otherCA(t *testing.T) string {
	t.Helper()
	key := newEC()
	template := &x509.Certificate{SerialNumber: bigOne, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// FuzzAuthorization: whatever a stranger sends, nothing passes that the issuer has not signed.
func FuzzAuthorization(f *testing.F) {
	p := testPlugin(f, workload.OIDC{})
	valid := "Bearer " + rs("rsa", good())
	f.Add(valid)
	f.Add("Bearer " + sign("ES256", ecKey, map[string]any{"kid": "ec"}, good()))
	f.Add("Bearer " + b64(map[string]any{"alg": "none"}) + "." + b64(good()) + ".")
	f.Add("Bearer ..")
	f.Add("bearer a,b")
	f.Fuzz(func(t *testing.T, authorization string) {
		r := check(t, p, authorization)
		if r.GetStatus().GetCode() != 0 {
			if s := r.GetDeniedResponse().GetStatus().GetCode(); s != 400 && s != 401 && s != 403 {
				t.Errorf("status %d", s)
			}
			return
		}
		for _, o := range r.GetOkResponse().GetHeaders() {
			if o.GetHeader().GetKey() == "x-cloister-sub" && o.GetHeader().GetValue() != "f3b5" {
				t.Errorf("a forged token passes: %q", authorization)
			}
		}
	})
}

func FuzzParseKeys(f *testing.F) {
	for _, k := range []jose.JSONWebKey{jwk("1", "", rsaKey.Public()), jwk("2", "ES256", ecKey.Public()), jwk("3", "", edPublic)} {
		b, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{k}})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		keys, err := parseKeys(b)
		if err == nil && len(keys) == 0 {
			t.Error("no keys and no error")
		}
		for _, k := range keys {
			k.fits("RS256")
			if p, ok := k.public.(*rsa.PublicKey); ok && p.N.BitLen() < minRSA {
				t.Error("a weak key")
			}
		}
	})
}

func BenchmarkCheck(b *testing.B) {
	p := testPlugin(b, workload.OIDC{})
	for name, authorization := range map[string]string{
		"RS256": "Bearer " + rs("rsa", good()),
		"ES256": "Bearer " + sign("ES256", ecKey, map[string]any{"kid": "ec"}, good()),
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if r := check(b, p, authorization); r.GetStatus().GetCode() != 0 {
					b.Fatal(r)
				}
			}
		})
	}
}
