package annotation

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"sigs.k8s.io/yaml"

	"cloister.dev/cloister/webhook/config"
)

var update = flag.Bool("update", false, "rewrite docs/annotations.md and docs/enclaveconfig.schema.json")

const schemaFile = "../../docs/enclaveconfig.schema.json"

// TestDocs holds the docs against the tables.
func TestDocs(t *testing.T) {
	schema, err := json.MarshalIndent(config.JSONSchema(), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{"../../docs/annotations.md": markdown(), schemaFile: string(schema) + "\n"} {
		if *update {
			if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, string(got)); diff != "" {
			t.Errorf("%s is not what the tables say (-want +got), `go test ./webhook/annotation -update` rewrites it:\n%s", file, diff)
		}
	}
}

func markdown() string {
	var b strings.Builder
	b.WriteString(`# Annotations

Of a pod, or of the template of one. Any other annotation under ` + "`" + Prefix + "`" + ` is denied.

| annotation | value | default | meaning |
|---|---|---|---|
`)
	for _, a := range Table {
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", a.Key, a.Type, a.Default, a.Sentence)
	}
	b.WriteString(`
## EnclaveConfig

The value of ` + "`" + Config + "`" + `: one YAML document, read strictly. A field that is unknown, misspelt or listed twice is denied,
and all errors are reported at once. [enclaveconfig.schema.json](enclaveconfig.schema.json) is its JSON Schema. Measured fields are in the
workload manifest and so in PCR16; the others are settings of the host, which it can change.

`)
	writeFields(&b, "", config.Fields())
	return b.String()
}

func writeFields(b *strings.Builder, path string, fields []config.Field) {
	if path != "" {
		fmt.Fprintf(b, "\n### %s\n\n", path)
	}
	b.WriteString("| field | value | default | measured | meaning |\n|---|---|---|---|---|\n")
	for _, f := range fields {
		deflt, measured := f.Default, "no"
		if f.Required != "" {
			deflt = "required"
		}
		if f.Measured {
			measured = "yes"
		}
		fmt.Fprintf(b, "| `%s` | %s | %s | %s | %s |\n", f.Key, f.Type, deflt, measured, f.Sentence)
	}
	for _, f := range fields {
		if len(f.Fields) == 0 {
			continue
		}
		below := f.Key
		if path != "" {
			below = path + "." + f.Key
		}
		if f.Schema["type"] == "array" {
			below += "[]"
		}
		writeFields(b, below, f.Fields)
	}
}

// TestTablesAreForPeople: whoever adds a row says what it is.
func TestTablesAreForPeople(t *testing.T) {
	for _, a := range Table {
		if !strings.HasPrefix(a.Key, Prefix) || a.Type == "" || a.Default == "" || !strings.HasSuffix(a.Sentence, ".") {
			t.Errorf("%s: say its type, its default and what it does", a.Key)
		}
	}
	var check func([]config.Field)
	check = func(fields []config.Field) {
		for _, f := range fields {
			if f.Type == "" || f.Schema["type"] == nil || !strings.HasSuffix(f.Sentence, ".") {
				t.Errorf("%s: say its type, its schema and what it does", f.Key)
			}
			check(f.Fields)
		}
	}
	check(config.Fields())
}

// TestSchema: the published schema accepts whatever the parser accepts, and refuses whatever the parser
// refuses for its shape.
func TestSchema(t *testing.T) {
	schema, err := jsonschema.NewCompiler().Compile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	docs := map[string]string{}
	for name, body := range map[string]string{
		"nothing":             "",
		"memory in bytes":     "memory: 1048576",
		"half a gibibyte":     "memory: 0.5Gi",
		"memory of words":     "memory: much",
		"null":                "cpus: null",
		"unknown":             "replicas: 1",
		"not built":           "debug: true",
		"port by nothing":     "ports: [{protocol: tcp}]",
		"port by both":        "ports: [{port: 80, name: http}]",
		"port in words":       "ports: [{port: '80'}]",
		"ports in a mapping":  "ports: {port: 80}",
		"egress of numbers":   "egress: [80]",
		"context of numbers":  "secrets: [{encryptionContext: {a: 1}}]",
		"context of nothing":  "secrets: [{encryptionContext: {a: null}}]",
		"header of nothing":   "plugins: [{name: a, type: logging, builtin: stdout, headers: [null]}]",
		"certificate of text": "kms: {certificate: x}",
		"logs to nowhere":     "logs: loki",
		"tls by acme":         "tls: acme",
		"plugin of no type":   "plugins: [{name: a, builtin: b}]",
		"plugin by nothing":   "plugins: [{name: a, type: logging}]",
		"plugin all right":    "plugins: [{name: a, type: logging, builtin: stdout}]",
	} {
		docs[name] = "apiVersion: cloister.dev/v1alpha1\nkind: EnclaveConfig\n" + body
	}
	docs["no kind"] = "apiVersion: cloister.dev/v1alpha1"
	docs["a list"] = "[]"
	pods, err := filepath.Glob("../inject/testdata/*/input.yaml")
	if err != nil || len(pods) < 20 {
		t.Fatalf("%d goldens found, %v", len(pods), err)
	}
	for _, file := range pods {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var pod struct {
			Metadata struct{ Annotations map[string]any }
		}
		if err := yaml.Unmarshal(b, &pod); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if doc, ok := pod.Metadata.Annotations[Config].(string); ok {
			docs[filepath.Base(filepath.Dir(file))] = doc
		}
	}
	accepted, refused := 0, 0
	for name, doc := range docs {
		var value any
		data, err := yaml.YAMLToJSONStrict([]byte(doc))
		if err != nil {
			continue // no schema is asked about what is not YAML
		}
		if value, err = jsonschema.UnmarshalJSON(strings.NewReader(string(data))); err != nil {
			t.Fatal(err)
		}
		_, errs := config.Parse(doc, field.NewPath("config"))
		invalid := schema.Validate(value)
		switch {
		case len(errs) == 0:
			if accepted++; invalid != nil {
				t.Errorf("%s: the parser accepts it, the schema does not: %v", name, invalid)
			}
		case misshapen(errs):
			if refused++; invalid == nil {
				t.Errorf("%s: the schema accepts it, the parser says %v", name, errs.ToAggregate())
			}
		}
	}
	if accepted < 10 || refused < 10 {
		t.Errorf("%d configs accepted and %d refused: too few to show anything", accepted, refused)
	}
}

// misshapen tells whether an error is about the shape and not about the content of a value, which it would
// name, or about the settings of a plugin, which are the plugin's to judge.
func misshapen(errs field.ErrorList) bool {
	for _, e := range errs {
		_, valueless := e.BadValue.(field.OmitValueType)
		switch e.Type {
		case field.ErrorTypeDuplicate:
		case field.ErrorTypeNotSupported:
			if !strings.HasSuffix(e.Field, ".builtin") {
				return true
			}
		case field.ErrorTypeInvalid:
			if valueless && !strings.HasSuffix(e.Field, "].config") {
				return true
			}
		default:
			return true
		}
	}
	return false
}
