//! The comparison as a picture: bars of seconds, a group for each row of the table.

use std::path::Path;

use plotters::prelude::*;

use super::report::{Report, title};

const BAR_HEIGHT: u32 = 14;
const LABEL_WIDTH: u32 = 270;
const WIDTH: u32 = 900;
const MARGIN: u32 = 12;

/// The arms' colours, readable with any colour vision.
const COLOURS: [RGBColor; 7] = [
    RGBColor(150, 150, 150),
    RGBColor(210, 210, 210),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
];

/// Draws an SVG file.
pub(super) fn draw(report: &Report, path: &Path) -> anyhow::Result<()> {
    let seconds = |arm: &str, row: &_| report.median(arm, row, |one| Some(one.seconds));
    let rows: Vec<_> = report.rows();
    let groups: Vec<Vec<(usize, f64)>> = rows
        .iter()
        .map(|row| {
            let arms = report.arms.iter().enumerate();
            arms.filter_map(|(index, arm)| Some((index, seconds(arm, row)?))).collect()
        })
        .collect();
    let longest = groups.iter().flatten().map(|(_, seconds)| *seconds).fold(1.0, f64::max);
    let bars: usize = groups.iter().map(|group| group.len() + 1).sum();
    let height = u32::try_from(bars)? * BAR_HEIGHT + 3 * MARGIN;
    let area = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let text = |size: u32| ("sans-serif", size).into_font().color(&BLACK);
    let pixels = |value: u32| i32::try_from(value).unwrap_or(i32::MAX);
    let mut top = pixels(2 * MARGIN + BAR_HEIGHT / 2);
    for (index, arm) in report.arms.iter().enumerate() {
        let left = pixels(LABEL_WIDTH) + pixels(90) * i32::try_from(index)?;
        area.draw(&Rectangle::new([(left, 6), (left + 10, 16)], COLOURS[index % COLOURS.len()].filled()))?;
        area.draw(&Text::new(arm.clone(), (left + 15, 5), text(12)))?;
    }
    for (row, group) in rows.iter().zip(&groups) {
        area.draw(&Text::new(title(row), (pixels(MARGIN), top), text(12)))?;
        for (arm, seconds) in group {
            // The root shows a second beside a minute.
            let share = (seconds / longest).sqrt();
            #[expect(clippy::cast_possible_truncation, reason = "at most the picture's width")]
            let length = (share * f64::from(WIDTH - LABEL_WIDTH - 70)) as i32;
            let (left, bottom) = (pixels(LABEL_WIDTH), top + pixels(BAR_HEIGHT) - 2);
            let colour = COLOURS[arm % COLOURS.len()].filled();
            area.draw(&Rectangle::new([(left, top), (left + length, bottom)], colour))?;
            area.draw(&Text::new(format!("{seconds:.1} s"), (left + length + 4, top), text(11)))?;
            top += pixels(BAR_HEIGHT);
        }
        top += pixels(BAR_HEIGHT);
    }
    area.present()?;
    Ok(())
}
