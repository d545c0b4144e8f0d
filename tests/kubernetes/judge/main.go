// What Kubernetes' own code says of our objects. A JSON object a line on standard input, an answer a line.
//
//	{"object": {...}}                             decode it into Go's own type of its kind, refusing what that does not know
//	{"select": "CEL", "driver": D, "device": {}}  whether a device class's expression selects a device of a slice
//
// The answer is {"error": "..."} or {"value": ...}.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"cel.dev/cel-go/cel"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/cel/environment"
	"k8s.io/client-go/kubernetes/scheme"
	sigsjson "sigs.k8s.io/json"
)

type question struct {
	Object json.RawMessage `json:"object"`
	Select string          `json:"select"`
	Driver string          `json:"driver"`
	Device device          `json:"device"`
}

type device struct {
	Attributes map[string]map[string]any `json:"attributes"`
}

func decode(object json.RawMessage) (any, error) {
	var named struct{ APIVersion, Kind string }
	if err := json.Unmarshal(object, &named); err != nil {
		return nil, err
	}
	into, err := scheme.Scheme.New(schema.FromAPIVersionAndKind(named.APIVersion, named.Kind))
	if err != nil {
		return nil, err
	}
	strict, err := sigsjson.UnmarshalStrict(object, into)
	if err != nil {
		return nil, err
	}
	if len(strict) > 0 {
		return nil, fmt.Errorf("%s: %v", named.Kind, strict)
	}
	return fmt.Sprintf("%T", into), nil
}

// The variables of k8s.io/dynamic-resource-allocation/cel, without types: driver, and attributes by domain and name.
func choose(q question) (any, error) {
	base, err := environment.MustBaseEnvSet(environment.DefaultCompatibilityVersion()).Env(environment.NewExpressions)
	if err != nil {
		return nil, err
	}
	env, err := base.Extend(cel.Variable("device", cel.DynType))
	if err != nil {
		return nil, err
	}
	tree, issues := env.Compile(q.Select)
	if issues.Err() != nil {
		return nil, issues.Err()
	}
	program, err := env.Program(tree)
	if err != nil {
		return nil, err
	}
	attributes := map[string]any{}
	for name, typed := range q.Device.Attributes {
		domain, short, qualified := strings.Cut(name, "/")
		if !qualified {
			domain, short = q.Driver, name
		}
		if attributes[domain] == nil {
			attributes[domain] = map[string]any{}
		}
		for _, value := range typed {
			attributes[domain].(map[string]any)[short] = value
		}
	}
	result, _, err := program.Eval(map[string]any{"device": map[string]any{"driver": q.Driver, "attributes": attributes}})
	if err != nil {
		return nil, err
	}
	return result.Value(), nil
}

func main() {
	lines := bufio.NewReaderSize(os.Stdin, 1<<20)
	answers := json.NewEncoder(os.Stdout)
	decoder := json.NewDecoder(lines)
	for decoder.More() {
		var q question
		var value any
		err := decoder.Decode(&q)
		if err == nil && q.Object != nil {
			value, err = decode(q.Object)
		} else if err == nil {
			value, err = choose(q)
		}
		if err != nil {
			answers.Encode(map[string]any{"error": err.Error()})
		} else {
			answers.Encode(map[string]any{"value": value})
		}
	}
}
