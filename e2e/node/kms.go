package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/e2e/kmsemu"
)

// kms is a KMS that believes documents of one root. It prints what was asked of it, a line of JSON each.
// Its ready line ends with its port.
func kms(ctx context.Context, args []string) error {
	config := kmsemu.Config{Trail: func(e kmsemu.Event) { json.NewEncoder(os.Stdout).Encode(e) }}
	flags := flag.NewFlagSet("kms", flag.ContinueOnError)
	flags.StringVar(&config.Region, "region", "", "`name` of its region")
	rootFile := flags.String("root", "", "`file` of the root certificate of attestation documents; AWS's if there is none")
	certificate := flags.String("certificate", "", "`file` of its TLS certificate")
	key := flags.String("key", "", "`file` of its TLS key")
	flags.Func("identity", "`ID:KEY:ARN` of somebody who signs requests", func(s string) error {
		f := strings.SplitN(s, ":", 3)
		if len(f) != 3 {
			return fmt.Errorf("want ID:KEY:ARN")
		}
		config.Identities = append(config.Identities, kmsemu.Identity{AccessKeyID: f[0], SecretAccessKey: f[1], ARN: f[2]})
		return nil
	})
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *rootFile != "" {
		pem, err := os.ReadFile(*rootFile)
		if err != nil {
			return err
		}
		if config.Root, err = attestation.ParseRoot(pem); err != nil {
			return err
		}
	}
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { l.Close() })
	fmt.Println("ready", l.Addr().(*net.TCPAddr).Port)
	err = http.ServeTLS(l, kmsemu.New(config), *certificate, *key)
	if ctx.Err() != nil {
		return nil
	}
	return err
}
