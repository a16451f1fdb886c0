package workload

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// MaxHostValues is how much the host may supply in all, names and values of variables and files together,
// in bytes: eight ConfigMaps or Secrets of the largest size (k8s.io/api/core/v1, MaxSecretSize). It lies
// in the enclave's memory.
const MaxHostValues = 8 << 20

// MaxHostFiles is how many files one mount may have.
const MaxHostFiles = 4096

// refusedEnv are variables that the host cannot supply unless Manifest.HostEnv names them: they make a
// program load other code, trust other certificates, talk to somebody else or write its keys down. "*" at
// an end stands for anything.
var refusedEnv = []string{
	// The dynamic loader and the C library (glibc, sysdeps/generic/unsecvars.h; musl, ldso).
	"LD_*", "GCONV_PATH", "GETCONF_DIR", "GLIBC_TUNABLES", "HOSTALIASES", "LOCALDOMAIN", "LOCPATH", "MALLOC_TRACE",
	"NIS_PATH", "NLSPATH", "RES_OPTIONS", "RESOLV_*",
	// Which programs are run, and what shells read before anything else.
	"PATH", "HOME", "SHELL", "IFS", "ENV", "BASH_ENV", "BASH_FUNC_*", "BASHOPTS", "SHELLOPTS", "CDPATH", "FPATH", "PS4", "PROMPT_COMMAND", "ZDOTDIR",
	"LESSOPEN", "LESSCLOSE", "GIT_*", "KUBECONFIG", "XDG_*", "CURL_HOME", "WGETRC", "NETRC", "MAGICK_*",
	// Languages and their runtimes.
	"PYTHON*", "PIP_*", "GUNICORN_CMD_ARGS", "UWSGI_*", "PERL*", "RUBY*", "GEM_*", "BUNDLE_*", "PHPRC", "PHP_INI_SCAN_DIR", "LUA_*", "R_ENVIRON*", "R_LIBS*", "R_PROFILE*", "ERL_*", "ELIXIR_ERL_OPTIONS", "JULIA_*", "TCLLIBPATH",
	"NODE_OPTIONS", "NODE_PATH", "NODE_EXTRA_CA_CERTS", "NODE_TLS_REJECT_UNAUTHORIZED", "NODE_REPL_*", "NODE_COMPILE_CACHE", "BUN_*", "DENO_*",
	"JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS", "IBM_JAVA_OPTIONS", "OPENJ9_JAVA_OPTIONS", "JAVA_OPTS*", "JAVA_HOME", "CATALINA_OPTS", "CLASSPATH", "LOADER_PATH",
	"DOTNET_STARTUP_HOOKS", "DOTNET_ADDITIONAL_DEPS", "DOTNET_SHARED_STORE", "DOTNET_GCName", "DOTNET_GCPath", "COMPlus_GCName", "COMPlus_GCPath", "DOTNET_HOSTINGSTARTUPASSEMBLIES", "ASPNETCORE_HOSTINGSTARTUPASSEMBLIES", "CORECLR_*", "COR_*", "GODEBUG",
	// Whom a program trusts, and where it writes its keys.
	"SSL_CERT_*", "SSLKEYLOGFILE", "OPENSSL_*", "GNUTLS_*", "KRB5_*", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
	"LDAPTLS_*", "PGSSLROOTCERT", "PGSYSCONFDIR", "PGSERVICEFILE",
	// Whom it talks to.
	"AWS_ENDPOINT_URL*", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_DATA_PATH", "AWS_EC2_METADATA_SERVICE_ENDPOINT", "BOTO_CONFIG",
	// Kept for Cloister.
	"CLOISTER_*",
}

// refusedAnyCase are more of them, which programs read in upper and lower case.
var refusedAnyCase = []string{"*_PROXY", "NPM_CONFIG_*"}

// RefusedEnv tells whether the host cannot supply a variable of this name unless Manifest.HostEnv names it.
func RefusedEnv(name string) bool {
	return matchesAny(refusedEnv, name) || matchesAny(refusedAnyCase, strings.ToUpper(name))
}

func matchesAny(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		if end, ok := strings.CutPrefix(p, "*"); ok {
			return strings.HasSuffix(name, end)
		}
		if begin, ok := strings.CutSuffix(p, "*"); ok {
			return strings.HasPrefix(name, begin)
		}
		return name == p
	})
}

// CheckHostEnv says why the host cannot supply a variable of this name, in a sentence without its value.
func (m *Manifest) CheckHostEnv(name string) error {
	switch {
	case name == "" || strings.ContainsAny(name, "=\x00"):
		return fmt.Errorf("env name %q must not be empty or contain = or NUL", name)
	case RefusedEnv(name) && !m.mayHost(name):
		return fmt.Errorf("env %s cannot be supplied by the host, which could change with it what the workload runs or whom it trusts: write its value into the pod, or name it in hostEnv", name)
	}
	return nil
}

// mayHost tells whether HostEnv, which is in ascending order, names a variable.
func (m *Manifest) mayHost(name string) bool {
	_, ok := slices.BinarySearch(m.HostEnv, name)
	return ok
}

// Directories over which nothing of the host is mounted: those of the first list with all that is below,
// of the second themselves, as are home directories: programs read what they run from there. What names accounts, hosts, libraries and trusted certificates is in the first.
var (
	systemTrees = []string{
		"/bin", "/boot", "/dev", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/sbin", "/sys",
		"/usr/bin", "/usr/include", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/libx32", "/usr/sbin",
		"/usr/local/bin", "/usr/local/include", "/usr/local/lib", "/usr/local/lib64", "/usr/local/libexec", "/usr/local/sbin",
		"/usr/share/ca-certificates", "/usr/local/share/ca-certificates", "/usr/local/ssl", "/var/lib/ca-certificates",
		"/etc/alternatives", "/etc/bash.bashrc", "/etc/bashrc", "/etc/ca-certificates", "/etc/ca-certificates.conf", "/etc/crypto-policies", "/etc/environment",
		"/etc/gai.conf", "/etc/gitconfig", "/etc/gnutls", "/etc/group", "/etc/gshadow", "/etc/host.conf", "/etc/hostname", "/etc/hosts", "/etc/inputrc", "/etc/krb5.conf", "/etc/krb5.conf.d",
		"/etc/mtab", "/etc/nsswitch.conf", "/etc/pam.d", "/etc/passwd", "/etc/pki", "/etc/profile", "/etc/profile.d",
		"/etc/resolv.conf", "/etc/security", "/etc/shadow", "/etc/shells", "/etc/ssl", "/etc/subgid", "/etc/subuid", "/etc/sudoers", "/etc/sudoers.d",
	}
	systemDirs = []string{"/", "/etc", "/home", "/opt", "/root", "/run", "/usr", "/usr/local", "/usr/local/share", "/usr/share", "/var", "/var/lib", "/var/run"}
)

// CheckHostPath says why nothing of the host can be mounted at p, a clean absolute path.
func CheckHostPath(p string) error {
	below := func(dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }
	switch {
	case slices.Contains(systemDirs, p), path.Dir(p) == "/home", slices.ContainsFunc(systemTrees, below), strings.HasPrefix(p, "/etc/ld.so"), strings.HasPrefix(p, "/etc/ld-musl-"):
		return fmt.Errorf("%s belongs to the system inside the enclave, and the host cannot supply it: mount it at a path of its own, such as /etc/app", p)
	case slices.ContainsFunc(strings.Split(p, "/"), func(s string) bool { return strings.HasPrefix(s, "..") }):
		return fmt.Errorf("%s has a part that begins with .., which is kept for updates: choose another", p)
	}
	return nil
}

// CheckHostHome says why nothing of the host can be mounted at p if home is the home directory of the workload's
// user, both clean absolute paths: programs read what they run from there.
func CheckHostHome(p, home string) error {
	if home == p || strings.HasPrefix(home, p+"/") {
		return fmt.Errorf("%s is or holds %s, the workload's home directory (HOME), and the host cannot supply it: mount it at a path of its own, such as /etc/app", p, home)
	}
	return nil
}

// validateHost checks what the host supplies: names of variables and paths of mounts.
func (m *Manifest) validateHost(bad func(string, ...any), text func(string, ...string)) {
	names, supplied := make(map[string]int, len(m.Env)), map[string]bool{}
	for _, e := range m.Env {
		names[e.Name]++
		if e.Host {
			supplied[e.Name] = true
		}
	}
	for _, e := range m.Env {
		if e.Name == "" || strings.Contains(e.Name, "=") {
			bad("env name %q must not be empty or contain =", e.Name)
		}
		if !isText(e.Name) || !isText(e.Value) {
			bad("env %s is not UTF-8 text without NUL", e.Name)
		}
		if !e.Host {
			continue
		}
		if e.Value != "" {
			bad("env %s has a value and is supplied by the host: remove one of them", e.Name)
		}
		if names[e.Name] > 1 {
			bad("env %s is supplied by the host and listed twice: keep one of them", e.Name)
		}
		if err := m.CheckHostEnv(e.Name); err != nil {
			bad("%w", err)
		}
	}
	if !ascending(m.HostEnv) {
		bad("hostEnv must be in ascending order without duplicates")
	}
	for _, name := range m.HostEnv {
		text("hostEnv", name)
		if !RefusedEnv(name) {
			bad("hostEnv %q must be left out: the host may supply it without being named here", name)
		}
		if !m.EnvFrom && !supplied[name] {
			bad("hostEnv %q must be left out: the host supplies no variable of this name", name)
		}
	}
	for _, v := range m.Mounts {
		if v.Kind != MountHost {
			continue
		}
		if err := CheckHostPath(v.Path); err != nil {
			bad("mount: %w", err)
		}
		// Most homes are known inside alone: from the image's accounts, or from variables.
		for _, e := range m.Env {
			if e.Name == "HOME" && path.IsAbs(e.Value) && !strings.Contains(e.Value, "$") {
				if err := CheckHostHome(v.Path, path.Clean(e.Value)); err != nil {
					bad("mount: %w", err)
				}
			}
		}
		if v.ReadOnly || v.SizeLimit != 0 {
			bad("mount %q: readOnly and sizeLimit must be left out: what the host supplies is always read-only", v.Path)
		}
	}
}

// HostMount returns the mount that the host supplies at path, or nil.
func (m *Manifest) HostMount(path string) *Mount {
	i := slices.IndexFunc(m.Mounts, func(v Mount) bool { return v.Kind == MountHost && v.Path == path })
	if i < 0 {
		return nil
	}
	return &m.Mounts[i]
}
