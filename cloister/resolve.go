package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/spf13/pflag"

	"cloister.dev/cloister/internal/registry"
	"cloister.dev/cloister/webhook/inject"
)

// Values of --pin, those of the field pin of EnclaveConfig.
const (
	pinResolve = "resolve"
	pinNever   = "never"
)

// resolveTimeout is how long one registry may take.
const resolveTimeout = 30 * time.Second

// tags are the flags of commands that may ask registries for the digests of tags.
type tags struct {
	pin   string
	plain []string
}

// addPlain adds the flag of the registries that are reached without TLS.
func (t *tags) addPlain(f *pflag.FlagSet) {
	f.StringSliceVar(&t.plain, "plain-http-registries", registry.ParseList(os.Getenv("PLAIN_HTTP_REGISTRIES")), "`registries`, HOST or HOST:PORT, that may be reached without TLS, as the installation lists them")
}

func (t *tags) add(f *pflag.FlagSet, pin string) {
	f.StringVar(&t.pin, "pin", pin, "resolve: ask registries for the digests of tags; never: refuse tags")
	t.addPlain(f)
}

func (t *tags) check() error {
	if t.pin != pinResolve && t.pin != pinNever {
		return fmt.Errorf("there is no --pin %q: write resolve or never", t.pin)
	}
	return nil
}

// resolver asks registries with the credentials of `docker login`; it is nil for --pin never.
func (t *tags) resolver() inject.Resolver {
	if t.pin == pinNever {
		return nil
	}
	client := registry.Client{PlainHTTP: t.plain, Keychain: authn.DefaultKeychain}
	return func(ctx context.Context, image string) (string, error) {
		ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
		defer cancel()
		pinned, err := client.Pin(ctx, image)
		if err != nil {
			return "", fmt.Errorf("its tag cannot be resolved with the credentials of `docker login`: %w", err)
		}
		return pinned, nil
	}
}
