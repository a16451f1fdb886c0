package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"cloister.dev/cloister/eif"
)

func newEIFExtract() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "extract FILE --dir DIR",
		Short: "Write the sections of an enclave image file to files",
		Long: `Writes the sections to files of a folder, which is made if need be: kernel, cmdline, metadata.json,
ramdisk0, ramdisk1, ..., and signature.cbor. The signature is not verified, for which see "cloister eif verify".`,
		Example: `  cloister eif extract app.eif --dir parts`,
		Args:    exactly("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if dir == "" {
				return errors.New("name the folder to write to with --dir")
			}
			return failed(extractEIF(cmd.Context(), cmd.OutOrStdout(), args[0], dir))
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "`folder` to write to, empty or not there yet")
	return cmd
}

// extractEIF writes all of it, or leaves the folder as it was.
func extractEIF(ctx context.Context, stdout io.Writer, file, dir string) (err error) {
	r, err := eif.Open(file)
	if err != nil {
		return err
	}
	defer r.Close()
	entries, err := os.ReadDir(dir)
	absent := errors.Is(err, fs.ErrNotExist)
	if err == nil && len(entries) > 0 {
		return fmt.Errorf("the folder %s is not empty: name another, so that nothing is mixed", dir)
	} else if err != nil && !absent {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var names []string
	defer func() {
		if err == nil {
			return
		}
		for _, name := range names {
			os.Remove(name)
		}
		if absent {
			os.Remove(dir)
		}
	}()
	ramdisks := 0
	for _, s := range r.Sections() {
		name := s.Type.String()
		switch s.Type {
		case eif.SectionRamdisk:
			name += fmt.Sprint(ramdisks)
			ramdisks++
		case eif.SectionMetadata:
			name += ".json"
		case eif.SectionSignature:
			name += ".cbor"
		}
		name = filepath.Join(dir, name)
		err := replaceFile(ctx, name, func(w io.WriteSeeker) error {
			_, err := io.Copy(w, s.Open())
			return err
		})
		if err != nil {
			return err
		}
		names = append(names, name)
	}
	_, err = fmt.Fprintln(stdout, strings.Join(names, "\n"))
	return err
}
