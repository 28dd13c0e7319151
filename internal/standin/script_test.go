package standin_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/standin"
)

const everything = `{
	"plain": {"steps": [{"text": "Hello."}]},
	"all.of-it": {
		"sessions": {"0a": 2},
		"variants": [
			[{"thinking": "Hm.", "text": "I look.", "tools": [{"name": "Bash", "input": {"command": "ls"}}], "delay": "1.5s", "output_tokens": 70,
			  "faults": [{"kind": "status", "status": 529, "headers": {"retry-after": "1"}, "times": 2}, {"kind": "cut", "after": 3}, {"kind": "hang", "times": -1}]}],
			[{"text": "No.", "stop_reason": "refusal"}]
		]
	}
}`

func TestScriptsAreRead(t *testing.T) {
	got, err := standin.ParseScripts(strings.NewReader(everything))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]standin.Script{
		"plain": {Steps: []standin.Step{{Text: "Hello."}}},
		"all.of-it": {
			Sessions: map[string]int{"0a": 2},
			Variants: [][]standin.Step{
				{{Thinking: "Hm.", Text: "I look.", Tools: []standin.Tool{tool("Bash", `{"command": "ls"}`)}, Delay: standin.Duration(1500 * time.Millisecond), OutputTokens: 70,
					Faults: []standin.Fault{
						{Kind: standin.FaultStatus, Status: 529, Headers: map[string]string{"retry-after": "1"}, Times: 2},
						{Kind: standin.FaultCut, After: 3},
						{Kind: standin.FaultHang, Times: standin.Always},
					}}},
				{{Text: "No.", StopReason: "refusal"}},
			},
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestScriptsThatCannotBePlayedAreRefused(t *testing.T) {
	step := func(s string) string { return `{"s": {"steps": [` + s + `]}}` }
	for _, text := range []string{
		``, `[]`, `{} {}`, `{"s": {}}`, `{"s": {"steps": []}}`, `{"s": {"variants": [[]]}}`,
		`{"s": {"steps": [{}], "variants": [[{}]]}}`, `{"s": {"steps": [{}], "sessions": {"a": 2}}}`,
		`{"no name": {"steps": [{}]}}`, `{"dot.": {"steps": [{}]}}`, `{"": {"steps": [{}]}}`,
		step(`{"txet": "x"}`), step(`{"delay": "soon"}`), step(`{"delay": "-1s"}`), step(`{"delay": "2h"}`), step(`{"output_tokens": -1}`),
		step(`{"stop_reason": "bored"}`), step(`{"tools": [{}]}`), step(`{"tools": [{"name": "Bash", "input": 7}]}`), step(`{"tools": [{"name": "Bash", "input": null}]}`),
		step(`{"faults": [{}]}`), step(`{"faults": [{"kind": "status", "status": 200}]}`), step(`{"faults": [{"kind": "cut", "status": 500}]}`),
		step(`{"faults": [{"kind": "cut", "after": -1}]}`), step(`{"faults": [{"kind": "cut", "times": -2}]}`),
		step(`{"text": "` + strings.Repeat("x", 9<<20) + `"}`),
	} {
		if _, err := standin.ParseScripts(strings.NewReader(text)); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%.80s: %v", text, err)
		}
	}
}

func FuzzParseScripts(f *testing.F) {
	f.Add([]byte(everything))
	f.Add([]byte(`{"s": {"steps": [{"tools": [{"name": "x"}], "delay": "1ns"}]}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		scripts, err := standin.ParseScripts(bytes.NewReader(raw))
		if err != nil {
			if fault.KindOf(err) != fault.Invalid {
				t.Errorf("kind %s: %v", fault.KindOf(err), err)
			}
			return
		}
		again, err := json.Marshal(scripts)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := standin.ParseScripts(bytes.NewReader(again)); err != nil {
			t.Errorf("what was read cannot be read again: %v\n%s", err, again)
		}
	})
}
