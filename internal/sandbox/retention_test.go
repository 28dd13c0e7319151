package sandbox

import (
	"slices"
	"testing"
	"time"
)

func TestRetentionKeepsWhatIsYoungSmallOrInUse(t *testing.T) {
	now := time.Date(2026, 3, 4, 0, 0, 0, 0, time.UTC)
	ago := func(hours int) time.Time { return now.Add(-time.Duration(hours) * time.Hour) }
	bases := []BaseInfo{
		{Key: "new", Created: ago(1), Bytes: 10},
		{Key: "old-but-used", Created: ago(100), Used: ago(2), Bytes: 10},
		{Key: "old", Created: ago(100), Used: ago(50), Bytes: 10},
		{Key: "older", Created: ago(100), Bytes: 10},
		{Key: "in-use", Created: ago(100), Bytes: 10, Users: 1},
		{Key: "damaged", Created: ago(1), Bytes: 10, Damaged: true},
		{Key: "damaged-in-use", Created: ago(100), Damaged: true, Users: 1},
	}
	for name, row := range map[string]struct {
		r    Retention
		want []string
	}{
		"by age":          {Retention{Age: 48 * time.Hour, Bytes: -1}, []string{"older", "old", "damaged"}},
		"by size":         {Retention{Age: 1000 * time.Hour, Bytes: 35}, []string{"older", "old", "damaged"}},
		"by a large size": {Retention{Age: 1000 * time.Hour, Bytes: 60}, []string{"damaged"}},
		"by both":         {Retention{Age: 60 * time.Hour, Bytes: 25}, []string{"older", "old", "old-but-used", "damaged"}},
		"all":             {Retention{}, []string{"older", "old", "old-but-used", "damaged", "new"}},
	} {
		var got []string
		for _, b := range row.r.Expired(bases, now) {
			got = append(got, b.Key)
		}
		if !slices.Equal(got, row.want) {
			t.Errorf("%s: %v, want %v", name, got, row.want)
		}
	}
}
