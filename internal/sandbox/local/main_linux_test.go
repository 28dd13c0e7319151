package local

import (
	"os"
	"testing"
)

// supervisorWord makes the test binary a supervisor.
const supervisorWord = "sandbox-supervisor"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == supervisorWord {
		os.Exit(Supervise(os.Args[2:]))
	}
	os.Exit(m.Run())
}

func testOptions(dir string) Options {
	return Options{Dir: dir, Supervisor: []string{os.Args[0], supervisorWord}}
}
