package workload

import (
	"os"
	"slices"
	"strings"
	"testing"
)

func TestRefusedEnv(t *testing.T) {
	for name, want := range map[string]bool{
		"LD_PRELOAD": true, "LD_": true, "path": false, "env": false, "home": false, "Npm_Config_Prefix": true, "PATH": true, "MYPATH": false, "PATHS": false, "https_proxy": true, "HTTPS_PROXY": true, "No_Proxy": true, "PROXY": false,
		"BASH_ENV": true, "ENV": true, "APP_ENV": false, "PYTHONPATH": true, "PYTHONHOME": true, "NODE_OPTIONS": true, "NODE_ENV": false, "_JAVA_OPTIONS": true,
		"SSL_CERT_FILE": true, "SSLKEYLOGFILE": true, "AWS_ENDPOINT_URL": true, "AWS_ENDPOINT_URL_S3": true, "AWS_REGION": false, "npm_config_registry": true,
		"GODEBUG": true, "GOMEMLIMIT": false, "GOMAXPROCS": false, "GLIBC_TUNABLES": true, "PERL5OPT": true, "RUBYOPT": true, "LUA_PATH_5_4": true, "GIT_SSH_COMMAND": true,
		"R_LIBS": true, "R_MODE": false, "CLOISTER_X": true, "DB_PASSWORD": false, "": false, "DOTNET_ENVIRONMENT": false, "BASH_FUNC_ls%%": true,
		"GUNICORN_CMD_ARGS": true, "UWSGI_IMPORT": true, "NODE_COMPILE_CACHE": true, "IBM_JAVA_OPTIONS": true, "JAVA_OPTS_APPEND": true, "LOADER_PATH": true, "DOTNET_GCName": true, "DOTNET_GCHeapHardLimit": false, "COMPlus_GCName": true,
		"ASPNETCORE_HOSTINGSTARTUPASSEMBLIES": true, "ASPNETCORE_URLS": false, "JULIA_LOAD_PATH": true, "MAGICK_CONFIGURE_PATH": true, "CURL_HOME": true, "PGSYSCONFDIR": true, "PGHOST": false,
		"LDAPTLS_REQCERT": true, "AWS_DATA_PATH": true, "AWS_EC2_METADATA_SERVICE_ENDPOINT": true, "AWS_PROFILE": false,
	} {
		if got := RefusedEnv(name); got != want {
			t.Errorf("RefusedEnv(%q) = %v", name, got)
		}
	}
}

func TestCheckHostPath(t *testing.T) {
	for p, want := range map[string]bool{
		"/etc/app": true, "/etc/nginx/conf.d": true, "/etc/ldap": true, "/etc/ssl-of-mine": true, "/srv": true, "/usr/share/nginx/html": true, "/usr/local/etc/redis": true,
		"/var/run/secrets/kubernetes.io/serviceaccount": true, "/run/secrets/db": true, "/tmp": true, "/app/..hidden": false, "/app/.hidden": true,
		"/": false, "/etc": false, "/usr": false, "/run": false, "/var/run": false, "/bin": false, "/bin/sh": false, "/binary": true, "/lib/x": false, "/lib64": false,
		"/usr/bin/app": false, "/usr/local/lib/python3": false, "/proc/1": false, "/sys": false, "/dev/shm/x": false,
		"/etc/passwd": false, "/etc/hosts": false, "/etc/resolv.conf": false, "/etc/ld.so.preload": false, "/etc/ld.so.conf.d/x.conf": false, "/etc/ld-musl-x86_64.path": false, "/etc/ssl/certs": false, "/etc/pki": false,
		// What programs read from their home directory: .bashrc, .local/lib/python3/site-packages, .npmrc.
		"/home/app": false, "/home/app/config": true, "/var/lib/ca-certificates/pem": false, "/usr/local/ssl": false, "/usr/local/ssl-of-mine": true, "/etc/gnutls/config": false, "/etc/krb5.conf.d": false,
	} {
		if err := CheckHostPath(p); (err == nil) != want {
			t.Errorf("%s: %v", p, err)
		}
	}
}

func TestHostValues(t *testing.T) {
	valid := func() *Manifest {
		return &Manifest{
			APIVersion: APIVersion,
			Image:      Image{Digest: "sha256:" + strings.Repeat("0", 64)},
			Env:        []EnvVar{{Name: "A", Host: true}, {Name: "B", Value: "$(A)"}, {Name: "LD_PRELOAD", Host: true}},
			EnvFrom:    true,
			HostEnv:    []string{"LD_PRELOAD", "PATH"},
			Mounts:     []Mount{{Path: "/etc/app", Kind: MountHost}, {Path: "/srv/key", Kind: MountHost, SubPath: "tls/key"}},
		}
	}
	c, err := valid().Canonical()
	if err != nil {
		t.Fatal(err)
	}
	const want = `"env":[{"host":true,"name":"A"},{"name":"B","value":"$(A)"},{"host":true,"name":"LD_PRELOAD"}],"envFrom":true,"hostEnv":["LD_PRELOAD","PATH"],` +
		`"image":{"digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000"},` +
		`"mounts":[{"kind":"host","path":"/etc/app"},{"kind":"host","path":"/srv/key","subPath":"tls/key"}]}`
	if !strings.HasSuffix(string(c), want) {
		t.Errorf("got  %s\nwant …%s", c, want)
	}
	m, err := Parse(c)
	if err != nil {
		t.Fatal(err)
	}
	if m.HostMount("/etc/app") == nil || m.HostMount("/etc") != nil {
		t.Error("HostMount does not find /etc/app, or finds /etc")
	}
	for name, tc := range map[string]struct {
		change func(*Manifest)
		want   string
	}{
		"value and host":         {func(m *Manifest) { m.Env[0].Value = "x" }, "env A has a value and is supplied by the host"},
		"listed twice":           {func(m *Manifest) { m.Env[1].Name = "A" }, "env A is supplied by the host and listed twice"},
		"refused name":           {func(m *Manifest) { m.Env[0].Name = "http_proxy" }, "env http_proxy cannot be supplied by the host"},
		"NUL":                    {func(m *Manifest) { m.Env[0].Name = "A\x00" }, "NUL"},
		"hostEnv not in order":   {func(m *Manifest) { m.HostEnv = []string{"PATH", "LD_PRELOAD"} }, "hostEnv must be in ascending order"},
		"hostEnv without need":   {func(m *Manifest) { m.HostEnv = []string{"A", "LD_PRELOAD"} }, `hostEnv "A" must be left out`},
		"hostEnv without a use":  {func(m *Manifest) { m.EnvFrom = false }, `hostEnv "PATH" must be left out`},
		"mount over the system":  {func(m *Manifest) { m.Mounts[0].Path = "/etc/ssl/certs" }, "/etc/ssl/certs belongs to the system"},
		"mount at HOME":          {func(m *Manifest) { m.Env[1] = EnvVar{Name: "HOME", Value: "/etc/app/"} }, "/etc/app is or holds /etc/app, the workload's home directory"},
		"mount above HOME":       {func(m *Manifest) { m.Env[1] = EnvVar{Name: "HOME", Value: "/etc/app/of/it"} }, "/etc/app is or holds /etc/app/of/it"},
		"readOnly of a host's":   {func(m *Manifest) { m.Mounts[0].ReadOnly = true }, "readOnly and sizeLimit must be left out"},
		"subPath leads out":      {func(m *Manifest) { m.Mounts[1].SubPath = "../key" }, "must be relative and clean"},
		"subPath absolute":       {func(m *Manifest) { m.Mounts[1].SubPath = "/key" }, "must be relative and clean"},
		"mount of another kind":  {func(m *Manifest) { m.Mounts[1].Kind = "hostPath" }, `must be "tmpfs" or "host"`},
		"secret of a host's env": {func(m *Manifest) { m.Secrets = []Secret{{Name: "a", Ciphertext: "YWJj", Env: "A"}} }, "env A is in the pod too"},
	} {
		t.Run(name, func(t *testing.T) {
			m := valid()
			tc.change(m)
			if err := m.Validate(); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

// TestRefusedEnvIsDocumented: who writes a pod must be able to look every name up.
func TestRefusedEnvIsDocumented(t *testing.T) {
	doc, err := os.ReadFile("../docs/host-supplied.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range slices.Concat(refusedEnv, refusedAnyCase) {
		if !strings.Contains(string(doc), "`"+name+"`") {
			t.Errorf("docs/host-supplied.md does not list %s", name)
		}
	}
}
