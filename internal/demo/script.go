package demo

import (
	"encoding/json"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/standin"
)

// Scripts returns the demo's script under [ScriptName]. It has three
// variants, each a correct fix of its own; the stand-in deals them out to the
// forks of a run. They use the tools Bash, Read and Edit, as Claude Code and
// the built-in agent have them. The second variant leaves its work
// uncommitted.
func Scripts() map[string]standin.Script {
	return map[string]standin.Script{ScriptName: {Variants: [][]standin.Step{absorb(), splice(), sweep()}}}
}

// A step that looks takes the time that a person needs to see it happen.
const pause = standin.Duration(400 * time.Millisecond)

func say(thinking, text string, tools ...standin.Tool) standin.Step {
	return standin.Step{Thinking: thinking, Text: text, Tools: tools, Delay: pause}
}

func bash(description, command string) standin.Tool {
	return tool("Bash", map[string]string{"command": command, "description": description})
}

func read(file string) standin.Tool { return tool("Read", map[string]string{"file_path": file}) }

func edit(file, old, with string) standin.Tool {
	return tool("Edit", map[string]string{"file_path": file, "old_string": old, "new_string": with})
}

func tool(name string, input map[string]string) standin.Tool {
	b, err := json.Marshal(input)
	if err != nil {
		panic(err) // a map of strings can always be encoded
	}
	return standin.Tool{Name: name, Input: b}
}

func commit(message string) standin.Tool {
	return bash("Commit the fix", "git -c user.name='Demo Agent' -c user.email=agent@example.com commit --quiet --all --message '"+message+"'")
}

// absorb lets the grown span take in its right-hand neighbours.
func absorb() []standin.Step {
	return []standin.Step{
		say("", "I will look at the repository and run its tests first.", bash("List files and history", "ls && git log --oneline")),
		say("", "", bash("Run the tests", "go test ./...")),
		say("", "Two tests fail, and both add a span that reaches over several others.", read("set.go")),
		say("Add grows the first span that it touches and returns. Whatever the grown span now reaches stays in the list.",
			"Add stops after the first span it touches. The grown span has to absorb the spans that it now reaches.",
			edit("set.go", `		s.spans[i].End = max(s.spans[i].End, sp.End)
		return
`, `		s.spans[i].End = max(s.spans[i].End, sp.End)
		// It may now reach the spans behind it: absorb them.
		j := i + 1
		for j < len(s.spans) && s.spans[j].Start <= s.spans[i].End {
			s.spans[i].End = max(s.spans[i].End, s.spans[j].End)
			j++
		}
		s.spans = append(s.spans[:i+1], s.spans[j:]...)
		return
`)),
		say("", "", bash("Run the tests again", "go test ./...")),
		say("", "All tests pass.", commit("Absorb every span that a grown span reaches")),
		say("", "Fixed and committed. Set.Add let the first span it touched grow and returned at once, so spans behind it could overlap it and were counted twice. "+
			"The grown span now absorbs its right-hand neighbours for as long as it reaches them. All tests pass."),
	}
}

// splice replaces everything that the new span reaches by one span.
func splice() []standin.Step {
	return []standin.Step{
		say("", "I start with what the tests say.", bash("Run the tests", "go test ./...")),
		say("", "", read("set.go"), read("set_test.go")),
		say("The spans that sp touches are neighbours in the list: from the first that ends at or after sp.Start up to the last that starts at or before sp.End. Two binary searches find them.",
			"The spans that the new one touches lie side by side. I will find both ends by binary search and replace them all by one.",
			edit("set.go", addBefore, `	// The spans that sp overlaps or touches are those from lo up to hi.
	lo := sort.Search(len(s.spans), func(i int) bool { return s.spans[i].End >= sp.Start })
	hi := sort.Search(len(s.spans), func(i int) bool { return s.spans[i].Start > sp.End })
	if lo < hi {
		sp.Start = min(sp.Start, s.spans[lo].Start)
		sp.End = max(sp.End, s.spans[hi-1].End)
	}
	rest := append([]Span{sp}, s.spans[hi:]...)
	s.spans = append(s.spans[:lo], rest...)
}
`)),
		say("", "", bash("Run the tests again", "gofmt -l . && go vet ./... && go test ./...")),
		say("", "The bug was in Set.Add: it merged the new span with the first neighbour only. I replaced the merge by two binary searches and one splice, "+
			"which handles any number of neighbours. The tests pass; I left the change uncommitted for review."),
	}
}

// sweep does without cleverness, and adds a test that tries everything.
func sweep() []standin.Step {
	return []standin.Step{
		say("", "First the code, then the tests.", read("set.go"), bash("Show the newest commit", "git show --stat HEAD")),
		say("", "", bash("Run the tests", "go test ./...")),
		say("The simplest code that is right: put the span in, sort, and join in one sweep.",
			"I will make Add plain: append the span, sort, and join neighbours in one sweep.",
			edit("set.go", addBefore, `	s.spans = append(s.spans, sp)
	sort.Slice(s.spans, func(i, j int) bool { return s.spans[i].Start < s.spans[j].Start })
	last := 0
	for _, next := range s.spans[1:] {
		if next.Start <= s.spans[last].End {
			s.spans[last].End = max(s.spans[last].End, next.End)
			continue
		}
		last++
		s.spans[last] = next
	}
	s.spans = s.spans[:last+1]
}
`)),
		say("", "I add a test that compares the set with a plain list of numbers for every small span.", bash("Add an exhaustive test", `cat >>set_test.go <<'END'

func TestAddAgreesWithAListOfNumbers(t *testing.T) {
	for start := 0; start < 14; start++ {
		for end := start; end <= 14; end++ {
			s := setOf(Span{1, 3}, Span{5, 7}, Span{9, 11})
			s.Add(Span{start, end})
			for n := 0; n < 14; n++ {
				want := n == 1 || n == 2 || n == 5 || n == 6 || n == 9 || n == 10 || start <= n && n < end
				if s.Contains(n) != want {
					t.Errorf("after adding [%d,%d): Contains(%d) = %v", start, end, n, !want)
				}
			}
		}
	}
}
END`)),
		say("", "", bash("Run the tests again", "go test ./...")),
		say("", "", commit("Join spans in one sweep")),
		say("", "Set.Add joined a new span with one neighbour at most. It now appends, sorts and joins in one sweep: O(n log n) instead of O(n), but plainly right. "+
			"A new test tries every small span against a list of numbers. All tests pass, and the work is committed."),
	}
}

// addBefore is the part of Set.Add that the second and third fix replace.
const addBefore = `	// The first span that ends at or after sp's start.
	i := sort.Search(len(s.spans), func(i int) bool { return s.spans[i].End >= sp.Start })
	if i < len(s.spans) && s.spans[i].Start <= sp.End {
		// sp overlaps or touches it: let it grow.
		s.spans[i].Start = min(s.spans[i].Start, sp.Start)
		s.spans[i].End = max(s.spans[i].End, sp.End)
		return
	}
	s.spans = append(s.spans, Span{})
	copy(s.spans[i+1:], s.spans[i:])
	s.spans[i] = sp
}
`
