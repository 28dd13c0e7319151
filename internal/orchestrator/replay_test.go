package orchestrator

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	historypb "go.temporal.io/api/history/v1"
	"go.temporal.io/sdk/client"
	sdklog "go.temporal.io/sdk/log"
	"go.temporal.io/sdk/worker"
	"go.temporal.io/sdk/workflow"
)

// TestRecordedHistoriesReplay guards the runs in flight: what was recorded
// from real runs must replay on the workflows as they are now. The histories
// are recorded by the sessions of cmd/sandbox-temporal, with -update.
func TestRecordedHistoriesReplay(t *testing.T) {
	files, err := filepath.Glob("testdata/history/*.json")
	if err != nil || len(files) < 6 {
		t.Fatalf("%d recorded histories, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			if err := replay(recorded(t, file)); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestReplayNoticesAChange shows that the test above can fail.
func TestReplayNoticesAChange(t *testing.T) {
	h := recorded(t, "testdata/history/success-fork-1.json")
	for _, e := range h.Events {
		if a := e.GetActivityTaskScheduledEventAttributes(); a != nil && a.ActivityType.Name == HealthCheck.Name {
			a.ActivityType.Name = "something_else"
		}
	}
	if replay(h) == nil {
		t.Error("a history with another activity replayed")
	}
}

func recorded(t *testing.T, file string) *historypb.History {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h, err := client.HistoryFromJSON(f, client.HistoryJSONOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func replay(h *historypb.History) error {
	r := worker.NewWorkflowReplayer()
	Serve(r)
	// Children are named after their parent, so the parent must replay under
	// its own name; left to itself the replayer calls every run "ReplayId".
	id := h.Events[0].GetWorkflowExecutionStartedEventAttributes().GetWorkflowId()
	return r.ReplayWorkflowHistoryWithOptions(sdklog.NewStructuredLogger(slog.New(slog.DiscardHandler)), h,
		worker.ReplayWorkflowHistoryOptions{OriginalExecution: workflow.Execution{ID: id}})
}
