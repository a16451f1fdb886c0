package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"cloister.dev/cloister/webhook/inject"
)

var errNoReference = errors.New("it is neither NAME[:TAG] nor NAME[:TAG]@sha256: and 64 hexadecimal digits: write one of them, the first is then pinned")

type pin struct {
	file string
	tags
}

func newPin() *cobra.Command {
	var p pin
	cmd := &cobra.Command{
		Use:   "pin -f FILE|-",
		Short: "Name images by digest in a YAML file",
		Long: `Asks registries for the digests of the images that run in enclaves and prints the file with them:
nginx:1.29 becomes nginx:1.29@sha256:…. Nothing else in the file changes, comments and layout included; images of
other containers, and those with a digest, stay as they are. The digest of an index stays that of the index.

Credentials are those that "docker login" has stored.`,
		Example: `  cloister pin -f deployment.yaml >pinned.yaml`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if p.file == "" {
				return errors.New("name the YAML file with -f, or - for standard input")
			}
			return failed(p.run(cmd.Context(), p.resolver(), cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()))
		},
	}
	f := cmd.Flags()
	f.StringVarP(&p.file, "filename", "f", "", "YAML or JSON `file` with one or more documents; - is standard input")
	p.addPlain(f)
	return cmd
}

func (p *pin) run(ctx context.Context, resolve inject.Resolver, stdin io.Reader, stdout, stderr io.Writer) error {
	text, err := readInput(p.file, stdin)
	if err != nil {
		return err
	}
	docs, err := inject.FromYAML(text)
	if err != nil {
		return fmt.Errorf("%s: %w", p.file, err)
	}
	// Both leave out documents that hold nothing.
	docs = slices.DeleteFunc(docs, func(d inject.Document) bool { return bytes.Equal(d.JSON, []byte("null")) })
	nodes, err := parseNodes(text)
	if err != nil {
		return fmt.Errorf("%s: %w", p.file, err)
	}
	if len(nodes) != len(docs) {
		return fmt.Errorf("%s: it cannot be said where its documents begin: separate them with lines of three hyphens", p.file)
	}

	lines := strings.SplitAfter(string(text), "\n")
	failures := 0
	for n, d := range docs {
		for _, t := range d.Templates {
			template, err := t.Decode()
			if err != nil {
				return fmt.Errorf("%s: %s %s: %w", p.file, t.Kind, t.Name, err)
			}
			i, tagged := inject.Tagged(&template.ObjectMeta, &template.Spec)
			if i < 0 {
				continue
			}
			image := template.Spec.Containers[i].Image
			if inject.HasDigest(image) {
				continue
			}
			var pinned string
			err = errNoReference
			if tagged {
				pinned, err = resolve(ctx, image)
			}
			if err == nil {
				err = splice(lines, find(nodes[n], t.At+"/spec/containers/"+strconv.Itoa(i)+"/image"), image, pinned)
			}
			if err != nil {
				failures++
				fmt.Fprintf(stderr, "%s: %s %s: image %s: %v\n", p.file, t.Kind, t.Name, image, err)
				continue
			}
			fmt.Fprintf(stderr, "%s: %s %s: %s\n", p.file, t.Kind, t.Name, pinned)
		}
	}
	if failures > 0 {
		return errors.New("nothing was pinned")
	}
	_, err = io.WriteString(stdout, strings.Join(lines, ""))
	return err
}

// parseNodes returns the root node of each document that is not null.
func parseNodes(text []byte) ([]*yaml.Node, error) {
	var out []*yaml.Node
	for d := yaml.NewDecoder(bytes.NewReader(text)); ; {
		var doc yaml.Node
		if err := d.Decode(&doc); errors.Is(err, io.EOF) {
			return out, nil
		} else if err != nil {
			return nil, err
		}
		if root := doc.Content[0]; root.ShortTag() != "!!null" {
			out = append(out, root)
		}
	}
}

// find returns the node at a JSON pointer of plain names and indexes, or nil where an alias or a merge
// stands between.
func find(node *yaml.Node, pointer string) *yaml.Node {
	for _, segment := range strings.Split(pointer, "/")[1:] {
		var next *yaml.Node
		switch node.Kind {
		case yaml.MappingNode:
			for i := 0; i+1 < len(node.Content); i += 2 {
				if node.Content[i].Value == segment {
					next = node.Content[i+1]
				}
			}
		case yaml.SequenceNode:
			if i, err := strconv.Atoi(segment); err == nil && i < len(node.Content) {
				next = node.Content[i]
			}
		}
		if next == nil {
			return nil
		}
		node = next
	}
	return node
}

// splice replaces a scalar that is written out at its node's position, plain or in quotes.
func splice(lines []string, node *yaml.Node, from, to string) error {
	if node == nil || node.Kind != yaml.ScalarNode {
		return errors.New("write it out where it is used: an alias may be used elsewhere too")
	}
	line := []rune(lines[node.Line-1])
	before, after := string(line[:node.Column-1]), string(line[node.Column-1:])
	quote := ""
	if node.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle) != 0 {
		quote, after = after[:1], after[1:]
	}
	rest, ok := strings.CutPrefix(after, from)
	if !ok || !strings.HasPrefix(rest, quote) {
		return fmt.Errorf("line %d: write it out in one line, without anchor, tag or escapes", node.Line)
	}
	lines[node.Line-1] = before + quote + to + rest
	return nil
}
