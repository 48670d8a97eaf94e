use std::time::Duration;

/// Reads a duration of the Gateway API ([GEP-2257](https://gateway-api.sigs.k8s.io/geps/gep-2257/)): one to four
/// numbers of one to five digits, each with a unit: `1h30m`, `500ms`, `0s`.
///
/// # Errors
/// Where it is none.
pub fn parse_duration(text: &str) -> Result<Duration, DurationError> {
    let mut total = Duration::ZERO;
    let mut rest = text;
    for _ in 0..4 {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = match digits {
            1..=5 => rest[..digits].parse().map_err(|_| DurationError)?,
            _ => return Err(DurationError),
        };
        rest = &rest[digits..];
        // The unit of two letters before those that it begins like.
        let (unit, length) = if let Some(after) = rest.strip_prefix("ms") {
            (after, Duration::from_millis(number))
        } else if let Some(after) = rest.strip_prefix('h') {
            (after, Duration::from_secs(number * 3600))
        } else if let Some(after) = rest.strip_prefix('m') {
            (after, Duration::from_secs(number * 60))
        } else if let Some(after) = rest.strip_prefix('s') {
            (after, Duration::from_secs(number))
        } else {
            return Err(DurationError);
        };
        total += length;
        rest = unit;
        if rest.is_empty() {
            return Ok(total);
        }
    }
    Err(DurationError)
}

/// Not a duration.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no duration; write one to four numbers with the units h, m, s or ms, such as 1h30m or 500ms")]
pub struct DurationError;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_the_gateway_api_has_them() {
        for (text, millis) in [
            ("0s", 0),
            ("0h", 0),
            ("500ms", 500),
            ("1m", 60_000),
            ("1h30m", 5_400_000),
            ("1h30m10s20ms", 5_410_020),
            ("10s10s", 20_000),
            ("99999h", 359_996_400_000),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
    }

    #[test]
    fn what_is_no_duration_is_refused() {
        for text in ["", "1", "s", "1.5s", "-1s", "100000s", "1s1s1s1s1s", "1d", "1us", " 1s", "1s ", "1 s", "１s"] {
            assert_eq!(parse_duration(text), Err(DurationError), "{text:?}");
        }
    }
}
