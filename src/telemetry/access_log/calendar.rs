use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

/// Writes times; lines of one second have most of it in common.
#[derive(Default)]
pub struct Calendar {
    second: Option<u64>,
    /// `2026-01-31T23:59:59.`
    written: String,
}

impl Calendar {
    /// `2026-01-31T23:59:59.123Z`
    pub fn push(&mut self, time: SystemTime, text: &mut String) {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        if self.second != Some(since.as_secs()) {
            self.turn(since.as_secs());
        }
        text.push_str(&self.written);
        let digit = |weight: u32| char::from(b'0' + (since.subsec_millis() / weight % 10) as u8);
        text.extend([digit(100), digit(10), digit(1), 'Z']);
    }

    /// The calendar by Howard Hinnant's `civil_from_days`.
    fn turn(&mut self, seconds: u64) {
        let (days, second) = (seconds / 86_400, seconds % 86_400);
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        let year = year_of_era + era * 400 + u64::from(month <= 2);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        self.written.clear();
        // Writing to a String does not fail.
        let _ = write!(self.written, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.");
        self.second = Some(seconds);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn days_are_told_by_the_calendar() {
        let mut calendar = Calendar::default();
        for (millis, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (999, "1970-01-01T00:00:00.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_767_225_599_070, "2025-12-31T23:59:59.070Z"),
            (1_767_225_599_071, "2025-12-31T23:59:59.071Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            let mut written = String::new();
            calendar.push(UNIX_EPOCH + Duration::from_millis(millis), &mut written);
            assert_eq!(written, text);
        }
    }
}
