package mini

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
)

// The words for how a session ended; they are Claude Code's terminal reasons.
const (
	completed        = "completed"
	reachedMaxTurns  = "max_turns"
	apiFailed        = "api_error"
	promptTooLong    = "prompt_too_long"
	abortedStreaming = "aborted_streaming" // while the model was asked
	abortedTools     = "aborted_tools"     // while a tool ran
)

// An ending is how a session ended.
type ending struct {
	subtype string
	reason  string
	isError bool
	text    string
	status  int    // HTTP status of the call that ended it; 0: none
	stop    string // the model's own reason
	turns   int    // 1 and the results of tools, as Claude Code counts
}

// A loop is one session at work.
type loop struct {
	opts   options
	log    *transcript
	model  *model
	tools  *toolbox
	events *events
}

func begin(o options, stdout io.Writer) (*loop, error) {
	t, err := openTranscript(o)
	if err != nil {
		return nil, err
	}
	return &loop{
		opts:   o,
		log:    t,
		model:  newModel(o),
		tools:  newToolbox(o.dir, o.home),
		events: &events{w: stdout, session: o.session, model: o.model},
	}, nil
}

// play asks the model and runs its tools until there is nothing left to do,
// or the context ends.
func (l *loop) play(ctx context.Context) ending {
	l.events.init(l.opts.dir, l.tools.names())
	if l.log.Ended != "" {
		return l.end(completed, l.log.lastText())
	}
	for {
		if l.log.Turns >= l.opts.turns {
			e := l.end(reachedMaxTurns, "")
			e.subtype, e.isError = "error_max_turns", true
			return e
		}
		if err := l.log.save(); err != nil {
			return l.broken(err)
		}
		reply, err := l.model.ask(ctx, l.log.Messages, l.tools.definitions(), l.system(), l.events.retry)
		if ctx.Err() != nil {
			return l.aborted(abortedStreaming)
		}
		if err != nil {
			return l.refused(err)
		}
		l.events.assistant(reply)
		switch reply.StopReason {
		case "refusal":
			return l.stopped(apiFailed, reply.StopReason, "The model declined to answer.")
		case "model_context_window_exceeded":
			return l.stopped(promptTooLong, reply.StopReason, "The conversation is too long for the model.")
		}
		l.log.hear(reply)
		if err := l.log.save(); err != nil {
			return l.broken(err)
		}
		if l.log.Ended != "" {
			return l.end(completed, l.log.lastText())
		}
		if !l.answer(ctx, reply) {
			return l.aborted(abortedTools)
		}
	}
}

// stopped is the end of a session whose model will not go on.
func (l *loop) stopped(reason, stop, text string) ending {
	e := l.end(reason, text)
	e.isError, e.stop = true, stop
	return e
}

// answer runs the tools of a reply and puts down what they said. It reports
// whether it came to its end before the context's.
func (l *loop) answer(ctx context.Context, reply *reply) bool {
	var results []json.RawMessage
	for _, b := range reply.blocks() {
		if b.Type != "tool_use" {
			continue
		}
		text, bad := "The call was cut short by max_tokens and was not run. Make it again, smaller.", true
		if reply.StopReason != "max_tokens" {
			text, bad = l.tools.run(ctx, b.Name, b.Input)
		}
		if ctx.Err() != nil {
			return false
		}
		l.log.Results++
		result := toolResult(b.ID, text, bad)
		l.events.toolResult(result)
		results = append(results, result)
	}
	switch {
	case len(results) > 0:
		l.log.say(results...)
	case reply.StopReason != "pause_turn":
		l.log.say(textBlock("Continue."))
	}
	return true
}

// system tells the model where it is. It is the same in every turn, so that
// the prompt cache works.
func (l *loop) system() string {
	return fmt.Sprintf("You are a coding agent that works alone in a sandbox. Use the tools to do what the user asks, "+
		"check your work, and end with a short account of what you did. Nobody can answer questions.\n"+
		"Working directory: %s\nPlatform: %s", l.opts.dir, runtime.GOOS)
}

func (l *loop) end(reason, text string) ending {
	return ending{subtype: "success", reason: reason, text: text, stop: l.log.Ended, turns: 1 + l.log.Results}
}

// refused is the end of a session whose model cannot be had.
func (l *loop) refused(err *callError) ending {
	e := l.end(apiFailed, err.Error())
	e.isError, e.status = true, err.status
	l.events.synthetic(e.text)
	return e
}

func (l *loop) aborted(reason string) ending {
	l.events.interrupted()
	e := l.end(reason, "")
	e.subtype, e.isError = "error_during_execution", true
	return e
}

// broken is the end of a session that cannot be kept.
func (l *loop) broken(err error) ending {
	e := l.end("", err.Error())
	e.subtype, e.isError = "error_during_execution", true
	return e
}

// environ is what the agent's commands get: our own environment without the
// key, which no command needs.
func environ(home string) []string {
	var env []string
	for _, kv := range os.Environ() {
		if !hasAnyPrefix(kv, "ANTHROPIC_API_KEY=", "ANTHROPIC_AUTH_TOKEN=", "HOME=") {
			env = append(env, kv)
		}
	}
	return append(env, "HOME="+home)
}
