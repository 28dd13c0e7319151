package local

import (
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// An alarm rings at a moment of the calendar. Go's timers stand still while
// the machine sleeps; a deadline does not.
type alarm struct {
	f *os.File
}

func newAlarm() (*alarm, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_REALTIME, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("timerfd_create", err)
	}
	return &alarm{os.NewFile(uintptr(fd), "alarm")}, nil
}

// set moves the moment, also while somebody waits.
func (a *alarm) set(t time.Time) error {
	if t.Unix() < 1 {
		t = time.Unix(1, 0) // zero would switch the alarm off; the past rings
	}
	at, err := unix.TimeToTimespec(t)
	if err != nil {
		return err
	}
	spec := unix.ItimerSpec{Value: at}
	raw, err := a.f.SyscallConn()
	if err != nil {
		return err
	}
	var setErr error
	err = raw.Control(func(fd uintptr) {
		setErr = unix.TimerfdSettime(int(fd), unix.TFD_TIMER_ABSTIME, &spec, nil)
	})
	if err != nil {
		return err
	}
	return os.NewSyscallError("timerfd_settime", setErr)
}

// wait returns true when the alarm rings and false when it was closed.
func (a *alarm) wait() bool {
	_, err := a.f.Read(make([]byte, 8))
	return err == nil
}

func (a *alarm) close() {
	if a != nil {
		_ = a.f.Close()
	}
}
