//! Lengths of time as people write them: `90d`, `12h`, `1w 2d`. A day has 24 hours.

use std::str::FromStr;
use std::time::Duration;

use jiff::{Span, SpanRelativeTo};
use serde::Deserialize;

/// A length of time that people write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Age(Duration);

/// A text that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a length of time; write for example 90d, 12h or 30m")]
pub struct InvalidAge(String);

impl Age {
    /// Its length.
    #[must_use]
    pub const fn duration(self) -> Duration {
        self.0
    }
}

impl From<Duration> for Age {
    fn from(duration: Duration) -> Self {
        Self(duration)
    }
}

impl FromStr for Age {
    type Err = InvalidAge;

    fn from_str(text: &str) -> Result<Self, InvalidAge> {
        let span: Option<Span> = text.parse().ok();
        let duration = span.and_then(|span| span.to_duration(SpanRelativeTo::days_are_24_hours()).ok());
        duration
            .and_then(|duration| Duration::try_from(duration).ok())
            .map(Self)
            .ok_or_else(|| InvalidAge(text.to_owned()))
    }
}

impl std::fmt::Display for Age {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let seconds = self.0.as_secs();
        let units = [(86_400, "d"), (3600, "h"), (60, "m"), (1, "s")];
        let (length, unit) =
            units.into_iter().find(|(length, _)| seconds.is_multiple_of(*length)).unwrap_or((1, "s"));
        write!(formatter, "{}{unit}", seconds / length)
    }
}

impl TryFrom<String> for Age {
    type Error = InvalidAge;

    fn try_from(text: String) -> Result<Self, InvalidAge> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_have_units() {
        let seconds = |text: &str| text.parse::<Age>().map(|age| age.duration().as_secs());
        assert_eq!(seconds("90d"), Ok(90 * 86_400));
        assert_eq!(seconds("12h"), Ok(12 * 3600));
        assert_eq!(seconds("2w"), Ok(14 * 86_400));
        assert_eq!(seconds("0s"), Ok(0));
        let round_trip = |text: &str| text.parse::<Age>().unwrap().to_string();
        assert_eq!((round_trip("2w"), round_trip("90m")), ("14d".to_owned(), "90m".to_owned()));
        for wrong in ["90", "", "d", "-1d", "1 month", "soon"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
